"""How much memory a call takes."""


def growth(call):
    """By how many bytes the resident memory of this process grows at most during ``call()``."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))
