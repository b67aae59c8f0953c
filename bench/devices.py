"""What the data sheets say of the GPUs that kernels are compiled for, and what follows from it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One architecture: limits of a multiprocessor (SM or CU) and the card that predictions are for.

    registers: 32-bit ones per multiprocessor, given to a warp in units of ``register_unit`` per thread.
    bandwidth: of device memory, bytes per second, as the data sheet states it.
    """

    target: str
    card: str
    bandwidth: float
    warp: int
    threads: int
    programs: int
    registers: int
    register_unit: int
    shared: int
    shared_reserved: int

    def resident(self, threads, registers, shared):
        """How many programs fit on a multiprocessor, and what limits them.

        threads: per program; registers: per thread; shared: bytes per program.
        """
        unit = self.register_unit
        per_thread = -(-max(registers, 1) // unit) * unit
        if self.warp == 32:
            by_registers = self.registers // (per_thread * threads)
        else:  # each of the CU's four SIMDs holds a quarter of the registers and of a program's warps
            by_registers = self.registers // 4 // self.warp // per_thread * 4 * self.warp // threads
        resident = {
            "threads": self.threads // threads,
            "programs": self.programs,
            "registers": by_registers,
            "shared memory": self.shared // (shared + self.shared_reserved) if shared else self.programs,
        }
        limit = min(resident, key=resident.get)
        return resident[limit], limit

    def occupancy(self, threads, registers, shared):
        """Resident threads over the most that there can be, and what limits them; arguments of resident."""
        programs, limit = self.resident(threads, registers, shared)
        return programs * threads / self.threads, limit


KB = 1024
DEVICES = {
    d.target: d
    for d in (
        Device("80", "A100 80GB SXM", 2.039e12, 32, 2048, 32, 65536, 8, 164 * KB, KB),
        Device("86", "A40", 0.696e12, 32, 1536, 16, 65536, 8, 100 * KB, KB),
        Device("89", "L40S", 0.864e12, 32, 1536, 24, 65536, 8, 100 * KB, KB),
        Device("90", "H100 SXM", 3.35e12, 32, 2048, 32, 65536, 8, 228 * KB, KB),
        Device("100", "B200", 8.0e12, 32, 2048, 32, 65536, 8, 228 * KB, KB),
        Device("120", "RTX PRO 6000", 1.792e12, 32, 1536, 24, 65536, 8, 100 * KB, KB),
        Device("gfx942", "MI300X", 5.3e12, 64, 2048, 32, 131072, 8, 64 * KB, 0),
    )
}
