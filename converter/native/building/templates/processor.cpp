// What the instructions of the kernels need, as the compiler's macros tell: compiled with the kernels' flags, data only.
#include "processor.h"

#define NEED(name, leaf, subleaf, word, bit, saved) \
  {"the kernels need " name ", which this processor or operating system lacks", leaf, subleaf, word, bit, saved},
#define YMM 0x6
#define ZMM 0xe6

const Feature gkp_features[] = {
#ifdef __SSE3__
    NEED("SSE3", 1, 0, 2, 0, 0)
#endif
#ifdef __SSSE3__
    NEED("SSSE3", 1, 0, 2, 9, 0)
#endif
#ifdef __FMA__
    NEED("FMA", 1, 0, 2, 12, YMM)
#endif
#ifdef __SSE4_1__
    NEED("SSE4.1", 1, 0, 2, 19, 0)
#endif
#ifdef __SSE4_2__
    NEED("SSE4.2", 1, 0, 2, 20, 0)
#endif
#ifdef __MOVBE__
    NEED("MOVBE", 1, 0, 2, 22, 0)
#endif
#ifdef __POPCNT__
    NEED("POPCNT", 1, 0, 2, 23, 0)
#endif
#ifdef __AVX__
    NEED("AVX", 1, 0, 2, 28, YMM)
#endif
#ifdef __F16C__
    NEED("F16C", 1, 0, 2, 29, YMM)
#endif
#ifdef __BMI__
    NEED("BMI1", 7, 0, 1, 3, 0)
#endif
#ifdef __AVX2__
    NEED("AVX2", 7, 0, 1, 5, YMM)
#endif
#ifdef __BMI2__
    NEED("BMI2", 7, 0, 1, 8, 0)
#endif
#ifdef __AVX512F__
    NEED("AVX-512F", 7, 0, 1, 16, ZMM)
#endif
#ifdef __AVX512DQ__
    NEED("AVX-512DQ", 7, 0, 1, 17, ZMM)
#endif
#ifdef __AVX512IFMA__
    NEED("AVX-512IFMA", 7, 0, 1, 21, ZMM)
#endif
#ifdef __AVX512CD__
    NEED("AVX-512CD", 7, 0, 1, 28, ZMM)
#endif
#ifdef __AVX512BW__
    NEED("AVX-512BW", 7, 0, 1, 30, ZMM)
#endif
#ifdef __AVX512VL__
    NEED("AVX-512VL", 7, 0, 1, 31, ZMM)
#endif
#ifdef __AVX512VBMI__
    NEED("AVX-512VBMI", 7, 0, 2, 1, ZMM)
#endif
#ifdef __AVX512VBMI2__
    NEED("AVX-512VBMI2", 7, 0, 2, 6, ZMM)
#endif
#ifdef __GFNI__
    NEED("GFNI", 7, 0, 2, 8, 0)
#endif
#ifdef __AVX512VNNI__
    NEED("AVX-512VNNI", 7, 0, 2, 11, ZMM)
#endif
#ifdef __AVX512BITALG__
    NEED("AVX-512BITALG", 7, 0, 2, 12, ZMM)
#endif
#ifdef __AVX512VPOPCNTDQ__
    NEED("AVX-512VPOPCNTDQ", 7, 0, 2, 14, ZMM)
#endif
#ifdef __AVX512FP16__
    NEED("AVX-512FP16", 7, 0, 3, 23, ZMM)
#endif
#ifdef __AVXVNNI__
    NEED("AVX-VNNI", 7, 1, 0, 4, YMM)
#endif
#ifdef __AVX512BF16__
    NEED("AVX-512BF16", 7, 1, 0, 5, ZMM)
#endif
#ifdef __LZCNT__
    NEED("LZCNT", 0x80000001, 0, 2, 5, 0)
#endif
    {nullptr, 0, 0, 0, 0, 0}};
