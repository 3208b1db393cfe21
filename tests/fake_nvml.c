/* A libnvidia-ml.so.1 whose GPUs are files: $FAKE_NVML_DIR/gpu0, gpu1, ... with lines of key=value, read at each call.
 * Keys: name, util, mem_used, temp, power_mw, ecc_corrected, ecc_uncorrected, remap_failed, xid (told once for each
 * value, when it was not there at the start); "lost", and "hang" (every call that asks
 * never returns). What has no line is not supported. It checks what we make of the answers, not the driver. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TIMEOUT = 10, GPU_IS_LOST = 15 };

static FILE *state_of(unsigned gpu) {
  const char *folder = getenv("FAKE_NVML_DIR");
  char path[4096];
  snprintf(path, sizeof path, "%s/gpu%u", folder ? folder : "/nonexistent", gpu);
  return fopen(path, "r");
}

static int find(void *handle, const char *key, char *value, size_t size) {
  FILE *file = state_of((unsigned)(size_t)handle - 1);
  char line[256];
  int found = 0;
  if (file == NULL) return 0;
  while (fgets(line, sizeof line, file)) {
    line[strcspn(line, "\n")] = 0;
    char *equals = strchr(line, '=');
    if (equals == NULL) continue;
    *equals = 0;
    if (strcmp(line, key) == 0) {
      snprintf(value, size, "%s", equals + 1);
      found = 1;
    }
  }
  fclose(file);
  return found;
}

static int number(void *handle, const char *key, unsigned long long *value) {
  char text[64];
  while (find(handle, "hang", text, sizeof text)) sleep(3600);
  if (find(handle, "lost", text, sizeof text)) return GPU_IS_LOST;
  if (!find(handle, key, text, sizeof text)) return NOT_SUPPORTED;
  *value = strtoull(text, NULL, 10);
  return SUCCESS;
}

static int narrow(void *handle, const char *key, unsigned *value) {
  unsigned long long wide = 0;
  int result = number(handle, key, &wide);
  *value = (unsigned)wide;
  return result;
}

int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
int nvmlInit_v2(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int result) { return result == GPU_IS_LOST ? "GPU is lost" : "fake error"; }

int nvmlDeviceGetCount_v2(unsigned *count) {
  for (*count = 0;; ++*count) {
    FILE *file = state_of(*count);
    if (file == NULL) return SUCCESS;
    fclose(file);
  }
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  unsigned count;
  nvmlDeviceGetCount_v2(&count);
  *handle = (void *)(size_t)(index + 1);
  return index < count ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
  snprintf(text, size, "GPU-fake-%zu", (size_t)handle - 1);
  return SUCCESS;
}

int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
  if (!find(handle, "name", text, size)) snprintf(text, size, "Fake GPU");
  return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long memory[3]) { /* total, free, used */
  memory[0] = 80ull << 30;
  int result = number(handle, "mem_used", &memory[2]);
  memory[1] = memory[0] - memory[2];
  return result;
}

int nvmlDeviceGetUtilizationRates(void *handle, unsigned rates[2]) { /* gpu, memory */
  rates[1] = 0;
  return narrow(handle, "util", &rates[0]);
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) { return narrow(handle, "temp", celsius); }

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) { return narrow(handle, "power_mw", milliwatts); }

int nvmlDeviceGetTotalEccErrors(void *handle, int type, int counter, unsigned long long *count) {
  return number(handle, type ? "ecc_uncorrected" : "ecc_corrected", count);
}

int nvmlDeviceGetRemappedRows(void *handle, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
  *corrected = *uncorrected = *pending = 0;
  return narrow(handle, "remap_failed", failed);
}

/* Events of the first 8 GPUs: the XID of one whose value is another than before. */
static unsigned long long told[8];
static int watched[8];

struct event {
  void *device;
  unsigned long long type, data;
  unsigned gpu_instance, compute_instance;
};

int nvmlEventSetCreate(void **set) {
  *set = told;
  return SUCCESS;
}

int nvmlDeviceRegisterEvents(void *handle, unsigned long long types, void *set) {
  unsigned index = (unsigned)(size_t)handle - 1;
  if (index >= 8) return NOT_SUPPORTED;
  number(handle, "xid", &told[index]);
  watched[index] = 1;
  return SUCCESS;
}

int nvmlEventSetWait_v2(void *set, struct event *event, unsigned timeout_ms) {
  for (unsigned index = 0; index < 8; ++index) {
    void *handle = (void *)(size_t)(index + 1);
    unsigned long long xid = told[index];
    if (!watched[index] || number(handle, "xid", &xid) != SUCCESS || xid == told[index]) continue;
    told[index] = xid;
    *event = (struct event){handle, 8, xid, 0, 0};
    return SUCCESS;
  }
  return TIMEOUT;
}
