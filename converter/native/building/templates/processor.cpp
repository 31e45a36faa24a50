// What the instructions of the kernels need, as they or the compiler's macros tell: compiled with the kernels' flags, data only.
#include "processor.h"

#define NEED(name, leaf, subleaf, word, bit, saved) \
  {"the kernels need " name ", which this processor or operating system lacks", leaf, subleaf, word, bit, saved},
#define YMM 0x6
#define ZMM 0xe6
#define TMM 0x60000

const Feature gkp_features[] = {
@FEATURES@
    {nullptr, 0, 0, 0, 0, 0}};
