// The network: which kernel runs on which part of memory, and how images are shared among threads. Written by gkp.
#include "model.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <new>

#include "pool.h"
#include "processor.h"

extern "C" {
__attribute__((visibility("hidden"))) extern const unsigned char gkp_data[];  // weights.bin
__attribute__((visibility("hidden"))) extern const char gkp_json[];           // describe.json and a 0

// source, residual or second operand, target, weights, part, parts
#define KERNEL(name) void name(const void*, const void*, void*, const unsigned char*, int, int)
@KERNELS@
}

namespace {

enum class Where { nowhere, arena, input, output };

// at: first byte in the arena, or number of the input or output.
struct Place {
  Where where;
  size_t at;
};

struct Step {
  KERNEL((*kernel));
  Place x, r, y;
  size_t data;  // offset in gkp_data
};

constexpr int MAX_THREADS = 1024;
constexpr size_t ARENA = @ARENA@;  // bytes of working memory for one image in flight, a multiple of 64
constexpr bool SHARED = @SHARED@;  // are steps long enough to be worth sharing among threads?
constexpr int INPUTS = @INPUTS@, OUTPUTS = @OUTPUTS@;
constexpr size_t INPUT_BYTES[] = {@INPUT_BYTES@};  // per image
constexpr size_t OUTPUT_BYTES[] = {@OUTPUT_BYTES@};
constexpr size_t INPUT_ELEMENT[] = {@INPUT_ELEMENT@};  // bytes
constexpr size_t OUTPUT_ELEMENT[] = {@OUTPUT_ELEMENT@};

constexpr Place arena(size_t at) { return {Where::arena, at}; }
constexpr Place input(size_t at) { return {Where::input, at}; }
constexpr Place output(size_t at) { return {Where::output, at}; }
constexpr Place none{Where::nowhere, 0};

// Halos of integers hold their zero point.
struct Fill {
  size_t first, bytes;
  int value;
};
const Fill fills[] = {
@FILLS@    {0, 0, 0}};

constexpr int STEPS = @COUNT@;
// kernel, source, residual or second operand, target, weights
const Step steps[] = {
@STEPS@
};

thread_local const char* create_error = "";

}  // namespace

struct gkp_model {
  explicit gkp_model(int threads) : pool(threads) {}

  char* arena(int worker) { return memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 + ARENA * worker; }

  Pool pool;
  char* memory = nullptr;  // of all arenas
  const pid_t process = getpid();
  Atomic<bool> busy{false};
  Atomic<const char*> error{""};
};

namespace {

struct Job {
  gkp_model* model;
  long batch;
  const float* const* inputs;
  float* const* outputs;
  Atomic<long> next{0};  // first image that no thread has taken

  const void* source(const Place& place, long image, char* memory) const {
    if (place.where != Where::input) return target(place, image, memory);
    return reinterpret_cast<const char*>(inputs[place.at]) + INPUT_BYTES[place.at] * image;
  }

  void* target(const Place& place, long image, char* memory) const {
    if (place.where == Where::arena) return memory + place.at;
    if (place.where != Where::output) return nullptr;
    return reinterpret_cast<char*>(outputs[place.at]) + OUTPUT_BYTES[place.at] * image;
  }

  void compute(const Step& step, long image, char* memory, int part, int parts) const {
    step.kernel(source(step.x, image, memory), source(step.r, image, memory), target(step.y, image, memory),
                gkp_data + step.data, part, parts);
  }
};

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// One image on one thread.
void compute_image(const Job& job, long image, char* memory, double* seconds) {
  double before = seconds != nullptr ? now() : 0;
  for (int s = 0; s < STEPS; ++s) {
    job.compute(steps[s], image, memory, 0, 1);
    if (seconds == nullptr) continue;
    const double after = now();
    seconds[s] += after - before;
    before = after;
  }
}

// As many images as go evenly into the threads (all, if steps are short) are taken one by one by whoever is free; the
// rest are computed one after another by all threads together, each doing its part of every step.
void work(void* context, int worker) {
  Job& job = *static_cast<Job*>(context);
  gkp_model& model = *job.model;
  const int threads = model.pool.threads();
  const long alone = SHARED ? job.batch - job.batch % threads : job.batch;
  while (alone > 0) {
    const long image = job.next.fetch_add(1);
    if (image >= alone) break;
    compute_image(job, image, model.arena(worker), nullptr);
  }
  if (alone == job.batch) return;
  model.pool.meet();  // the first thread's arena is free now
  for (long image = alone; image < job.batch; ++image) {
    for (const Step& step : steps) {
      job.compute(step, image, model.arena(0), worker, threads);
      model.pool.meet();
    }
  }
}

int fail(gkp_model* model, int status, const char* text) {
  model->error.store(text);
  return status;
}

void check(const void* array, size_t element, const char** problem) {
  if (array == nullptr) *problem = "an input or output is NULL";
  if (reinterpret_cast<uintptr_t>(array) % element != 0) *problem = "an input or output lies at no multiple of 4";
}

// GKP_OK with the handle reserved for this thread, or a failure.
int reserve(gkp_model* model, long batch, const float* const* inputs, float* const* outputs) {
  if (model == nullptr) return GKP_BAD_ARGUMENT;
  if (batch < 1) return fail(model, GKP_BAD_ARGUMENT, "the batch must be at least 1");
  if (inputs == nullptr || outputs == nullptr) return fail(model, GKP_BAD_ARGUMENT, "inputs or outputs is NULL");
  const char* problem = nullptr;
  for (int i = 0; i < INPUTS; ++i) check(inputs[i], INPUT_ELEMENT[i], &problem);
  for (int i = 0; i < OUTPUTS; ++i) check(outputs[i], OUTPUT_ELEMENT[i], &problem);
  if (problem != nullptr) return fail(model, GKP_BAD_ARGUMENT, problem);
  if (model->pool.threads() > 1 && model->process != getpid()) {
    return fail(model, GKP_BAD_ARGUMENT, "the handle's threads are in another process: create a handle after the fork");
  }
  if (model->busy.exchange(true)) return fail(model, GKP_BUSY, "the handle is in use by another thread");
  return GKP_OK;
}

int fail_create(int status, const char* text) {
  create_error = text;
  return status;
}

}  // namespace

int gkp_create(int threads, gkp_model** out) {
  if (out == nullptr) return fail_create(GKP_BAD_ARGUMENT, "out is NULL");
  *out = nullptr;
  if (threads < 1 || threads > MAX_THREADS) return fail_create(GKP_BAD_ARGUMENT, "threads must be 1 to 1024");
  if (const char* missing = missing_feature()) return fail_create(GKP_UNSUPPORTED_PROCESSOR, missing);
  if (tiles_denied()) return fail_create(GKP_DENIED, "the kernels need AMX, which the operating system denies this process");
  const size_t bytes = ARENA * static_cast<size_t>(threads);
  void* place = aligned_alloc(alignof(gkp_model), sizeof(gkp_model));
  char* memory = static_cast<char*>(calloc(bytes + 64, 1));  // kernels rely on zeros around planes
  if (place == nullptr || memory == nullptr) {
    free(memory);
    free(place);
    return fail_create(GKP_OUT_OF_MEMORY, "out of memory");
  }
  gkp_model* model = new (place) gkp_model(threads);
  model->memory = memory;
  for (int t = 0; t < threads; ++t)
    for (const Fill& fill : fills) memset(model->arena(t) + fill.first, fill.value, fill.bytes);
  if (!model->pool.create()) {
    free(memory);
    free(place);
    return fail_create(GKP_NO_THREADS, "the system refused to start a thread");
  }
  *out = model;
  return GKP_OK;
}

int gkp_run(gkp_model* model, long batch, const float* const* inputs, float* const* outputs) {
  if (const int status = reserve(model, batch, inputs, outputs)) return status;
  Job job{model, batch, inputs, outputs};
  if (!SHARED && batch == 1) {
    compute_image(job, 0, model->arena(0), nullptr);
  } else {
    model->pool.run(work, &job);
  }
  model->busy.store(false);
  return GKP_OK;
}

int gkp_profile(gkp_model* model, long batch, const float* const* inputs, float* const* outputs, double* seconds) {
  if (model != nullptr && seconds == nullptr) return fail(model, GKP_BAD_ARGUMENT, "seconds is NULL");
  if (const int status = reserve(model, batch, inputs, outputs)) return status;
  const Job job{model, batch, inputs, outputs};
  for (long image = 0; image < batch; ++image) compute_image(job, image, model->arena(0), seconds);
  model->busy.store(false);
  return GKP_OK;
}

void gkp_destroy(gkp_model* model) {
  if (model == nullptr) return;
  if (model->process == getpid()) model->pool.destroy();  // the threads of another process are not here
  free(model->memory);
  free(model);
}

const char* gkp_describe(void) { return gkp_json; }

const char* gkp_last_error(const gkp_model* model) { return model == nullptr ? create_error : model->error.load(); }
