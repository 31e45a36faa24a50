/* classify IMAGE: runs one image through a model compiled by gkp and prints the class with the highest score. IMAGE holds
 * float32 numbers, normalised as in training, or uint8 where the model takes pixels, in the order channel, row, column. See
 * README.md for how to build it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

/* Elements of the first port after `key` in the description, e.g. "inputs": [{"name": "x", "shape": [3, 32, 32]}]. A
 * program that knows its model needs none of this. */
static long elements(const char* description, const char* key) {
  const char* at = strstr(description, key);
  long product = 1;
  at = at ? strstr(at, "\"shape\": [") : NULL;
  if (at == NULL) return 0;
  for (at = strchr(at, '['); *at == '[' || *at == ','; ) {
    char* end;
    product *= strtol(at + 1, &end, 10);
    at = end;
  }
  return product;
}

/* Does the first port after `key` hold bytes, e.g. "dtype": "uint8"? */
static int is_bytes(const char* description, const char* key) {
  const char* at = strstr(description, key);
  at = at ? strstr(at, "\"dtype\": \"") : NULL;
  return at != NULL && strncmp(strchr(at, ':') + 3, "uint8\"", 6) == 0;
}

int main(int argc, char** argv) {
  const long in = elements(gkp_describe(), "\"inputs\":"), out = elements(gkp_describe(), "\"outputs\":");
  const int bytes = is_bytes(gkp_describe(), "\"inputs\":");
  const size_t size = bytes ? 1 : sizeof(float);
  float* image = (float*)malloc((size_t)in * size); /* of bytes too: model.h takes any array as one of float */
  float* scores = (float*)malloc((size_t)out * sizeof(float));
  FILE* file = argc == 2 ? fopen(argv[1], "rb") : NULL;
  gkp_model* model = NULL;
  const float* inputs[1];
  float* outputs[1];
  long i, best = 0;
  if (image == NULL || scores == NULL || file == NULL || fread(image, size, (size_t)in, file) != (size_t)in) {
    fprintf(stderr, "usage: classify IMAGE   (a file of %ld %s numbers)\n", in, bytes ? "uint8" : "float32");
    return 2;
  }
  fclose(file);
  if (gkp_create(1, &model) != GKP_OK) {
    fprintf(stderr, "error: %s\n", gkp_last_error(NULL));
    return 1;
  }
  inputs[0] = image;
  outputs[0] = scores;
  if (gkp_run(model, 1, inputs, outputs) != GKP_OK) {
    fprintf(stderr, "error: %s\n", gkp_last_error(model));
    return 1;
  }
  for (i = 1; i < out; ++i) {
    if (scores[i] > scores[best]) best = i;
  }
  printf("class %ld, score %g\n", best, scores[best]);
  gkp_destroy(model);
  free(image);
  free(scores);
  return 0;
}
