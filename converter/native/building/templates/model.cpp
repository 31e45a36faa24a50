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

enum class Where { nowhere, arena, own, input, output };

// at: first byte in the arena, or number of the input or output. further: of what each image of a group has of its own, first
// byte in the memory of each image but the first.
struct Place {
  Where where;
  size_t at, further;
};

struct Step {
  KERNEL((*kernel));
  Place x, r, y;
  size_t data;  // offset in gkp_data
  int together;  // parts of it that are computed for all images of a group, one after another; 0: images are, as far as here
};

constexpr int MAX_THREADS = 1024;
constexpr size_t ARENA = @ARENA@;  // bytes of working memory for one image in flight, a multiple of 64
constexpr int GROUP = @GROUP@;  // images that one thread computes together, at most
constexpr size_t FURTHER = @FURTHER@;  // bytes for each of them but the first, a multiple of 64
constexpr bool SHARED = @SHARED@;  // are steps long enough to be worth sharing among threads?
constexpr int INPUTS = @INPUTS@, OUTPUTS = @OUTPUTS@;
constexpr size_t INPUT_BYTES[] = {@INPUT_BYTES@};  // per image
constexpr size_t OUTPUT_BYTES[] = {@OUTPUT_BYTES@};
constexpr size_t INPUT_ELEMENT[] = {@INPUT_ELEMENT@};  // bytes
constexpr size_t OUTPUT_ELEMENT[] = {@OUTPUT_ELEMENT@};

constexpr Place arena(size_t at) { return {Where::arena, at, 0}; }
constexpr Place own(size_t at, size_t further) { return {Where::own, at, further}; }
constexpr Place input(size_t at) { return {Where::input, at, 0}; }
constexpr Place output(size_t at) { return {Where::output, at, 0}; }
constexpr Place none{Where::nowhere, 0, 0};

// Halos of integers hold their zero point.
struct Fill {
  size_t first, bytes;
  int value;
};
const Fill fills[] = {
@FILLS@    {0, 0, 0}};
const Fill further_fills[] = {
@FURTHER_FILLS@    {0, 0, 0}};

constexpr int STEPS = @COUNT@;
// kernel, source, residual or second operand, target, weights, together
const Step steps[] = {
@STEPS@
};

thread_local const char* create_error = "";

char* aligned(char* memory) { return memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64; }

}  // namespace

struct gkp_model {
  explicit gkp_model(int threads) : pool(threads) {}

  char* arena(int worker) { return aligned(memory) + ARENA * worker; }
  char* further(int worker) { return groups == nullptr ? nullptr : aligned(groups) + FURTHER * (GROUP - 1) * worker; }

  Pool pool;
  char* memory = nullptr;  // of all arenas
  char* groups = nullptr;  // of the further images of all groups, once there was a batch
  const pid_t process = getpid();
  Atomic<bool> busy{false};
  Atomic<const char*> error{""};
};

namespace {

// Where a thread computes. further: of the images of a group but the first; nullptr: it computes one at a time.
struct Memory {
  char *arena, *further;
};

struct Job {
  gkp_model* model;
  long batch;
  const float* const* inputs;
  float* const* outputs;
  Atomic<long> next{0};  // first image that no thread has taken

  const void* source(const Place& place, long image, char* arena, char* further) const {
    if (place.where != Where::input) return target(place, image, arena, further);
    return reinterpret_cast<const char*>(inputs[place.at]) + INPUT_BYTES[place.at] * image;
  }

  void* target(const Place& place, long image, char* arena, char* further) const {
    if (place.where == Where::own && further != nullptr) return further + place.further;
    if (place.where == Where::arena || place.where == Where::own) return arena + place.at;
    if (place.where != Where::output) return nullptr;
    return reinterpret_cast<char*>(outputs[place.at]) + OUTPUT_BYTES[place.at] * image;
  }

  // further: the image's own memory, nullptr: it has the arena
  void compute(const Step& step, long image, char* arena, char* further, int part, int parts) const {
    step.kernel(source(step.x, image, arena, further), source(step.r, image, arena, further),
                target(step.y, image, arena, further), gkp_data + step.data, part, parts);
  }

  // Takes the next images before `end`, at most `most`, no more than a thread's share of what is left, in even groups; how
  // many.
  int take(long end, int threads, int most, long* first) {
    for (long from = next.load(); from < end;) {
      const long share = (end - from + threads - 1) / threads, groups = (share + most - 1) / most;
      const long count = (share + groups - 1) / groups;
      *first = from;
      if (next.compare_exchange(&from, from + count)) return static_cast<int>(count);
    }
    return 0;
  }
};

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// A group on one thread: each image through all steps up to the next one that is computed together, or all images through
// each part of that, so that its weights are read once. The first image comes last, because it has the arena, in which
// lies for all of them what is only needed before the first step that is computed together.
void compute_group(const Job& job, long first, int count, Memory memory, double* seconds) {
  double before = seconds != nullptr ? now() : 0;
  for (int begin = 0, end; begin < STEPS; begin = end) {
    end = begin + 1;
    while (!steps[begin].together && end < STEPS && !steps[end].together) ++end;
    const int parts = count > 1 && steps[begin].together ? steps[begin].together : 1;
    for (int n = parts * count - 1; n >= 0; --n) {
      const int k = n % count;
      char* further = k == 0 ? nullptr : memory.further + FURTHER * (k - 1);
      for (int s = begin; s < end; ++s) {
        job.compute(steps[s], first + k, memory.arena, further, n / count, parts);
        if (seconds == nullptr) continue;
        const double after = now();
        seconds[s] += after - before;
        before = after;
      }
    }
  }
}

// Images that no other thread takes, until there is none before `end`.
void compute_images(Job& job, long end, int threads, Memory memory, double* seconds) {
  long first;
  while (const int count = job.take(end, threads, memory.further == nullptr ? 1 : GROUP, &first))
    compute_group(job, first, count, memory, seconds);
}

// As many images as go evenly into the threads (all, if steps are short) are taken in groups by whoever is free; the rest
// are computed one after another by all threads together, each doing its part of every step.
void work(void* context, int worker) {
  Job& job = *static_cast<Job*>(context);
  gkp_model& model = *job.model;
  const int threads = model.pool.threads();
  const long alone = SHARED ? job.batch - job.batch % threads : job.batch;
  compute_images(job, alone, threads, {model.arena(worker), model.further(worker)}, nullptr);
  if (alone == job.batch) return;
  model.pool.meet();  // the first thread's arena is free now
  for (long image = alone; image < job.batch; ++image) {
    for (const Step& step : steps) {
      job.compute(step, image, model.arena(0), nullptr, worker, threads);
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

// Memory for groups, if the batch has any and there is enough; without it images are computed one by one.
void allow_groups(gkp_model* model, long batch, int threads) {
  if (GROUP == 1 || batch <= threads || model->groups != nullptr) return;
  const size_t workers = static_cast<size_t>(model->pool.threads());
  model->groups = static_cast<char*>(calloc(FURTHER * (GROUP - 1) * workers + 64, 1));
  if (model->groups == nullptr) return;
  for (size_t k = 0; k < (GROUP - 1) * workers; ++k)
    for (const Fill& fill : further_fills) memset(aligned(model->groups) + FURTHER * k + fill.first, fill.value, fill.bytes);
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
  allow_groups(model, batch, model->pool.threads());
  Job job{model, batch, inputs, outputs};
  if (!SHARED && batch == 1) {
    compute_group(job, 0, 1, {model->arena(0), nullptr}, nullptr);
  } else {
    model->pool.run(work, &job);
  }
  model->busy.store(false);
  return GKP_OK;
}

int gkp_profile(gkp_model* model, long batch, const float* const* inputs, float* const* outputs, double* seconds) {
  if (model != nullptr && seconds == nullptr) return fail(model, GKP_BAD_ARGUMENT, "seconds is NULL");
  if (const int status = reserve(model, batch, inputs, outputs)) return status;
  allow_groups(model, batch, 1);
  Job job{model, batch, inputs, outputs};
  compute_images(job, batch, 1, {model->arena(0), model->further(0)}, seconds);
  model->busy.store(false);
  return GKP_OK;
}

void gkp_destroy(gkp_model* model) {
  if (model == nullptr) return;
  if (model->process == getpid()) model->pool.destroy();  // the threads of another process are not here
  free(model->groups);
  free(model->memory);
  free(model);
}

const char* gkp_describe(void) { return gkp_json; }

const char* gkp_last_error(const gkp_model* model) { return model == nullptr ? create_error : model->error.load(); }
