// The numbers are those of neumuter_kernels.reference.ACTIVATIONS.
#pragma once

namespace neumuter {

enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kIdentity, kCount };

}  // namespace neumuter
