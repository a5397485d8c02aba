// Marks plain functions that host and device code share.
#pragma once

#if defined(__CUDACC__)
#define WANDA_EXT_HOST_DEVICE __host__ __device__
#else
#define WANDA_EXT_HOST_DEVICE
#endif
