/* A neural network compiled by gkp into one library that needs libc only.
 *
 * Arrays are contiguous, [batch, channels, height, width] or what gkp_describe says, at any address that is a multiple of their
 * elements' size; outputs must not overlap inputs. The elements are of the "dtype" that gkp_describe names: "float32" is float,
 * "uint8" unsigned char (such an input is passed as (const float*)array). A handle is used by one thread at a time (GKP_BUSY
 * otherwise); any number of handles may be used at once. Nothing is shared between handles but constants. */
#ifndef GKP_MODEL_H
#define GKP_MODEL_H

#if defined(__GNUC__)
#define GKP_API __attribute__((visibility("default")))
#else
#define GKP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct gkp_model gkp_model;

enum gkp_status {
  GKP_OK = 0,
  GKP_BAD_ARGUMENT = 1,          /* NULL, batch < 1, threads < 1 or > 1024, a handle of another process */
  GKP_OUT_OF_MEMORY = 2,
  GKP_UNSUPPORTED_PROCESSOR = 3, /* the kernels need instructions that are not here */
  GKP_BUSY = 4,                  /* the handle is in use by another thread */
  GKP_NO_THREADS = 5,            /* the system refused to start a thread */
  GKP_DENIED = 6                 /* the system denies this process instructions that the kernels need */
};

/* A handle that computes with `threads` threads, the caller's among them. *out is NULL after a failure. */
GKP_API int gkp_create(int threads, gkp_model** out);

/* Computes a batch: inputs[i] and outputs[i] are the arrays of `batch` images of the i-th input and output. */
GKP_API int gkp_run(gkp_model* model, long batch, const float* const* inputs, float* const* outputs);

/* The same on one thread; adds the seconds spent in step i to seconds[i]. gkp_describe lists the steps. */
GKP_API int gkp_profile(gkp_model* model, long batch, const float* const* inputs, float* const* outputs, double* seconds);

/* Frees the handle (NULL: nothing happens). Not while it runs. */
GKP_API void gkp_destroy(gkp_model* model);

/* JSON (ASCII): format, cpu, inputs and outputs with name, shape of one image and dtype, steps, sizes in bytes. */
GKP_API const char* gkp_describe(void);

/* What went wrong in the handle's last failed call; NULL: in this thread's last failed gkp_create. "" if nothing did. */
GKP_API const char* gkp_last_error(const gkp_model* model);

#ifdef __cplusplus
}
#endif

#endif
