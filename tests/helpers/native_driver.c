/* driver THREADS BATCH INPUTS SIZE...: reads the file "inputs", runs the model, writes the file "outputs". SIZE: floats per
 * image, of every input and then of every output. Each array lies in memory of just its size; everything runs twice, and
 * once more with gkp_profile, and must give the same (with several threads it may round otherwise). C and C++. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

static size_t size_of(char** argv, int i, long batch) { return (size_t)atol(argv[4 + i]) * (size_t)batch * sizeof(float); }

static int fail(const char* what) {
  fprintf(stderr, "%s\n", what);
  return 1;
}

int main(int argc, char** argv) {
  const int threads = atoi(argv[1]), inputs = atoi(argv[3]), ports = argc - 4;
  const long batch = atol(argv[2]);
  float* arrays[16];
  float* first[16];
  double* seconds = (double*)calloc(100000, sizeof(double));
  gkp_model* model = NULL;
  FILE* file = fopen("inputs", "rb");
  int i;
  for (i = 0; i < ports; ++i) {
    arrays[i] = (float*)malloc(size_of(argv, i, batch));
    first[i] = (float*)malloc(size_of(argv, i, batch));
    if (i < inputs && fread(arrays[i], 1, size_of(argv, i, batch), file) != size_of(argv, i, batch)) return fail("inputs");
  }
  fclose(file);
  if (gkp_create(threads, &model) != GKP_OK) return fail(gkp_last_error(NULL));
  if (gkp_run(model, batch, (const float* const*)arrays, arrays + inputs) != GKP_OK) return fail(gkp_last_error(model));
  for (i = inputs; i < ports; ++i) memcpy(first[i], arrays[i], size_of(argv, i, batch));
  if (gkp_run(model, batch, (const float* const*)arrays, arrays + inputs) != GKP_OK) return fail(gkp_last_error(model));
  for (i = inputs; i < ports; ++i)
    if (memcmp(first[i], arrays[i], size_of(argv, i, batch)) != 0) return fail("the second run gives something else");
  if (gkp_profile(model, batch, (const float* const*)arrays, arrays + inputs, seconds) != GKP_OK) return fail("profile");
  for (i = inputs; i < ports && threads == 1; ++i)
    if (memcmp(first[i], arrays[i], size_of(argv, i, batch)) != 0) return fail("gkp_profile gives something else");
  gkp_destroy(model);
  file = fopen("outputs", "wb");
  for (i = inputs; i < ports; ++i) fwrite(arrays[i], 1, size_of(argv, i, batch), file);
  fclose(file);
  for (i = 0; i < ports; ++i) free(arrays[i]), free(first[i]);
  free(seconds);
  return 0;
}
