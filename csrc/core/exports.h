// What the shared library exports: the functions of the public headers. CMake includes this file in
// front of every source, and hides everything else.
#pragma once

#pragma GCC visibility push(default)
#include "wanda_ext/ops.h"
#pragma GCC visibility pop
