#!/usr/bin/env bash
# Builds into the folder $1 what a machine with an NVIDIA driver has: libcuda.so.1, libnvidia-ml.so.1 (nvml.c), a library
# to preload (cudart.c), and bin/nvidia-smi. Calls of libcuda fail with "no device", but for the question whether a
# device has a context: none has, and torch 2.13 does not go on without an answer.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=$1
mkdir -p "$out"
# What vLLM's compiled libraries, Triton and FlashInfer link to.
driver="
    cuCtxGetCurrent cuCtxGetDevice cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit
    cuDeviceGet cuDeviceGetAttribute cuDevicePrimaryCtxRetain
    cuDriverGetVersion cuFuncGetAttribute cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorString cuGetProcAddress_v2
    cuInit cuLaunchCooperativeKernel cuLaunchKernel cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2 cuMemAddressFree
    cuMemAddressReserve cuMemCreate cuMemGetAllocationGranularity cuMemMap cuMemRelease cuMemSetAccess cuMemUnmap
    cuModuleGetFunction cuModuleLoad cuModuleLoadData cuModuleLoadDataEx cuModuleUnload
    cuOccupancyMaxActiveBlocksPerMultiprocessor cuPointerGetAttribute cuTensorMapEncodeTiled
"
{
    for name in $driver; do echo "int $name(void) { return 100; }"; done
    echo "int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = *active = 0; }"
} |
    gcc -x c -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$out/libcuda.so.1" -
gcc -shared -fPIC -w -Wl,-soname,libnvidia-ml.so.1 -o "$out/libnvidia-ml.so.1" "$here/nvml.c"
gcc -shared -fPIC -w -o "$out/cudart.so" "$here/cudart.c"
ln -sf libcuda.so.1 "$out/libcuda.so"
mkdir -p "$out/bin"
cat >"$out/bin/nvidia-smi" <<'TOOL'
#!/usr/bin/env bash
for ((gpu = 0; gpu < FAKE_GPU_COUNT; gpu++)); do
    case $1 in
    -L) echo "GPU $gpu: $FAKE_GPU_NAME (UUID: GPU-$gpu)" ;;
    --query-gpu=name) echo "$FAKE_GPU_NAME" ;;
    --query-gpu=memory.total) echo $((FAKE_GPU_GIB * 1024)) ;;
    esac
done
TOOL
chmod +x "$out/bin/nvidia-smi"
