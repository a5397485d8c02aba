// One source, several ISAs: how the CPU ops are vectorised.
//
// An op is plain loops in WANDA_EXT_INLINE functions under one WANDA_EXT_CLONES entry. gcc compiles
// the entry, with all that is inlined into it, once for each ISA below and picks one when the
// library is loaded. What is not inlined would stay at the baseline ISA, so no std:: call and no
// lambda goes into a hot loop. Every clone gives the same bits: sums are written out in the order
// they are added, and -ffp-contract=off keeps a * b + c two roundings.
//
// An op that must know its registers' width has one entry for each WANDA_EXT_TARGET instead.
#pragma once

#include <cstdint>

#if defined(WANDA_EXT_NO_CLONES) || !defined(__x86_64__) || !defined(__GLIBC__) || \
    !defined(__GNUC__) || defined(__clang__)
#define WANDA_EXT_CLONES
#else
#define WANDA_EXT_TARGET(isa) __attribute__((target(isa)))
#if __GNUC__ >= 12
#define WANDA_EXT_HAS_X86_64_V4
#define WANDA_EXT_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define WANDA_EXT_CLONES __attribute__((target_clones("default", "avx2")))
#endif
#endif

// Where a file of one instruction set can be compiled (records_*.cpp): the set is chosen when an op
// is called, so that sanitizers and other C libraries do not matter.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define WANDA_EXT_X86_FILES
#endif

#define WANDA_EXT_INLINE inline __attribute__((always_inline))
