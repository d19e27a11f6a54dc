// Runs the kernels of kernels.cu on the processor: a thread for each of a block's, one block after the other.
//
// In: calls on stdin. Out: what they leave in their outputs, on stdout. All numbers are 4 bytes, of this machine's order: the length of the
// kernel's name and its bytes, blocks; a count of inputs, each a length and elements; a count of scalars; a count of outputs, each a length.
// A call that does not fit the kernel's parameters ends the program.

#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#define THREADS 4
#define __global__
#define __device__ static
#define __shared__ static
#define __syncthreads() together.arrive_and_wait()

struct place {
    unsigned x;
};
static thread_local place threadIdx, blockIdx;
static std::barrier<> together(THREADS);

#include "kernels.cu"

static void fail(const char *why) {
    fprintf(stderr, "%s\n", why);
    exit(1);
}

static void read_all(void *to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) fail("a call ends early");
}

static unsigned read_number() {
    unsigned number;
    read_all(&number, sizeof number);
    return number;
}

static std::vector<unsigned> read_list() {
    std::vector<unsigned> list(read_number());
    read_all(list.data(), 4 * list.size());
    return list;
}

struct call {
    unsigned blocks;
    std::vector<std::vector<unsigned>> inputs, outputs;
    std::vector<unsigned> scalars;
    size_t input = 0, scalar = 0, output = 0;

    const void *next_input() { return input < inputs.size() ? inputs[input++].data() : (fail("too few inputs"), nullptr); }
    unsigned next_scalar() { return scalar < scalars.size() ? scalars[scalar++] : (fail("too few scalars"), 0); }
    void give(const float *&to) { to = static_cast<const float *>(next_input()); }
    void give(const unsigned *&to) { to = static_cast<const unsigned *>(next_input()); }
    void give(int &to) { to = static_cast<int>(next_scalar()); }
    void give(float &to) {
        unsigned bits = next_scalar();
        memcpy(&to, &bits, sizeof to);
    }
    void give(float *&to) {
        if (output == outputs.size()) fail("too few outputs");
        to = reinterpret_cast<float *>(outputs[output++].data());
    }
};

template <class... A> static void run(void (*kernel)(A...), call &given) {
    std::tuple<A...> parameters;
    std::apply([&](auto &...each) { (given.give(each), ...); }, parameters);
    if (given.input != given.inputs.size() || given.scalar != given.scalars.size() || given.output != given.outputs.size()) fail("too many parameters");
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < THREADS; thread++) {
        threads.emplace_back([&, thread] {
            threadIdx.x = thread;
            for (unsigned block = 0; block < given.blocks; block++) {
                blockIdx.x = block;
                std::apply(kernel, parameters);
                together.arrive_and_wait();
            }
        });
    }
    for (auto &thread : threads) thread.join();
}

int main() {
    unsigned length;
    while (fread(&length, sizeof length, 1, stdin) == 1) {
        std::string name(length, ' ');
        read_all(name.data(), length);
        call given;
        given.blocks = read_number();
        for (unsigned inputs = read_number(); inputs > 0; inputs--) given.inputs.push_back(read_list());
        given.scalars = read_list();
        for (unsigned outputs = read_number(); outputs > 0; outputs--) given.outputs.emplace_back(read_number(), 0x7fc00000); // NaN
        if (name == "norm_forward") run(norm_forward, given);
        else if (name == "norm_backward") run(norm_backward, given);
        else if (name == "glu_forward") run(glu_forward, given);
        else if (name == "glu_backward") run(glu_backward, given);
        else if (name == "turn") run(turn, given);
        else if (name == "attention_forward") run(attention_forward, given);
        else if (name == "attention_backward") run(attention_backward, given);
        else if (name == "next_token") run(next_token, given);
        else fail("there is no such kernel");
        for (auto &output : given.outputs) fwrite(output.data(), 4, output.size(), stdout);
        fflush(stdout);
    }
}
