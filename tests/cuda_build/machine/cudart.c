/* Preloaded before the CUDA runtime: the calls that torch makes around operations on fake tensors. Nothing runs. */
#include <stdlib.h>

static int current;

int cudaGetDevice(int *device) {
    *device = current;
    return 0;
}

int cudaSetDevice(int device) {
    current = device;
    return 0;
}

int cudaGetDeviceCount(int *count) {
    *count = atoi(getenv("FAKE_GPU_COUNT"));
    return 0;
}

int cudaDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}

int cudaStreamIsCapturing(void *stream, int *status) {
    *status = 0;
    return 0;
}

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return 0;
}

int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    *stream = (void *)1;
    return 0;
}

int cudaEventCreateWithFlags(void **event, unsigned flags) {
    *event = (void *)1;
    return 0;
}

int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaStreamQuery(void *stream) { return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventQuery(void *event) { return 0; }
int cudaEventDestroy(void *event) { return 0; }
