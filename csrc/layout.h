// The numbers are those of neumuter_kernels.reference.Layout.
#pragma once

namespace neumuter {

// How the gate and up activations of an FFN lie in memory, [..., F] each.
enum class Layout : int {
  kPlain,        // there is no up: a plain FFN
  kSeparate,     // two tensors
  kHalves,       // one tensor [..., 2F]: gate in its first half, up in its second
  kInterleaved,  // one tensor [..., 2F]: gate in its even columns, up in its odd ones
  kCount
};

}  // namespace neumuter
