#pragma once

namespace binconv::python {

// Makes the library's calls the kernels of the operators that binconv.torch.ops defines. Throws
// kNotSupported where no PyTorch of a known interface is loaded.
void register_operators();

}  // namespace binconv::python
