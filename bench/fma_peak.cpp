// Multiply-adds a second of the threads together: fma_peak CORE... prints multiplications and additions.
//
// Twelve independent sums in registers are more than an addition's latency asks for on two units.
#include <pthread.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float vfloat __attribute__((vector_size(kLanes * 4)));
constexpr int kSums = 12;
constexpr long kSteps = 20000000;

volatile float sink;

void work(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
  vfloat factor = vfloat{} + 0.999f;
  asm("" : "+x"(factor));
  vfloat s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{};
  for (long i = 0; i < kSteps; ++i) {
    s0 = s0 * factor + factor, s1 = s1 * factor + factor, s2 = s2 * factor + factor;
    s3 = s3 * factor + factor, s4 = s4 * factor + factor, s5 = s5 * factor + factor;
    s6 = s6 * factor + factor, s7 = s7 * factor + factor, s8 = s8 * factor + factor;
    s9 = s9 * factor + factor, s10 = s10 * factor + factor, s11 = s11 * factor + factor;
    asm("" : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5));
    asm("" : "+x"(s6), "+x"(s7), "+x"(s8), "+x"(s9), "+x"(s10), "+x"(s11));
  }
  const vfloat all = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + s10 + s11;
  sink = all[0];
}

}  // namespace

int main(int argc, char** argv) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (int i = 1; i < argc; ++i) threads.emplace_back(work, std::atoi(argv[i]));
  for (std::thread& thread : threads) thread.join();
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
  std::printf("%.0f\n", 2.0 * kLanes * kSums * kSteps * (argc - 1) / passed.count());
}
