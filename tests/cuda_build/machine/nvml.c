/* A libnvidia-ml.so.1 that reports the GPU of the variables FAKE_GPU_*: what vLLM, torch and FlashInfer ask of one. */
#include <stdio.h>
#include <stdlib.h>

typedef int result;
typedef void *device;

static unsigned long number(const char *name) { return strtoul(getenv(name), NULL, 10); }
static unsigned long index_of(device d) { return (unsigned long)d - 1; }

result nvmlInit(void) { return 0; }
result nvmlInit_v2(void) { return 0; }
result nvmlInitWithFlags(unsigned flags) { return 0; }
result nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(result r) { return "not known to this stub"; }

result nvmlDeviceGetCount_v2(unsigned *count) {
    *count = number("FAKE_GPU_COUNT");
    return 0;
}

result nvmlDeviceGetHandleByIndex_v2(unsigned index, device *d) {
    *d = (device)(unsigned long)(index + 1);
    return 0;
}

result nvmlDeviceGetIndex(device d, unsigned *index) {
    *index = index_of(d);
    return 0;
}

result nvmlDeviceGetCudaComputeCapability(device d, int *major, int *minor) {
    *major = number("FAKE_GPU_CAPABILITY") / 10;
    *minor = number("FAKE_GPU_CAPABILITY") % 10;
    return 0;
}

result nvmlDeviceGetName(device d, char *name, unsigned size) {
    snprintf(name, size, "%s", getenv("FAKE_GPU_NAME"));
    return 0;
}

result nvmlDeviceGetUUID(device d, char *uuid, unsigned size) {
    snprintf(uuid, size, "GPU-00000000-0000-0000-0000-%012lu", index_of(d));
    return 0;
}

struct memory { unsigned long long total, free, used; };
struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };

result nvmlDeviceGetMemoryInfo(device d, struct memory *m) {
    m->total = m->free = number("FAKE_GPU_GIB") << 30;
    m->used = 0;
    return 0;
}

result nvmlDeviceGetMemoryInfo_v2(device d, struct memory_v2 *m) {
    m->total = m->free = number("FAKE_GPU_GIB") << 30;
    m->reserved = m->used = 0;
    return 0;
}

result nvmlDeviceGetP2PStatus(device a, device b, int capabilities, int *status) {
    *status = 0;
    return 0;
}

result nvmlDeviceGetNumaNodeId(device d, unsigned *node) {
    *node = 0;
    return 3; /* not supported */
}

result nvmlSystemGetDriverVersion(char *version, unsigned size) {
    snprintf(version, size, "590.00");
    return 0;
}

result nvmlSystemGetCudaDriverVersion(int *version) {
    *version = 13000;
    return 0;
}

result nvmlSystemGetCudaDriverVersion_v2(int *version) { return nvmlSystemGetCudaDriverVersion(version); }
