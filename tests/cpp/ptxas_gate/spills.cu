// A kernel that keeps more values alive than 1,024 threads have registers for.

constexpr int kValues = 200;
constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads) spills(float* p) {
  float values[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = p[i * kThreads + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) p[i * kThreads + threadIdx.x] = values[i] * values[kValues - 1 - i];
}
