// Replays calls under gcc's sanitizers: every tensor in heap memory of exactly its size. `call_function` is generated from the op's
// header (sanitized.py), which also writes the two files that this reads.
//
// calls: lines "tensor BYTES", "call NAME NUMBER_OF_ARGUMENTS", then one line per argument: "tensor INDEX" of the call's tensors, "null 0",
// "real X", "integer I". data: the bytes of the tensors in order.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

extern "C" const char* ledom_emulation_error();
extern "C" void ledom_emulation_set_schedule(int schedule);

struct Argument {
  void* pointer = nullptr;
  double real = 0;
  int64_t integer = 0;
};

int call_function(const std::string& name, const std::vector<Argument>& arguments);

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

int main(int, char** files) {
  std::ifstream calls(files[1]), data(files[2], std::ios::binary);
  ledom_emulation_set_schedule(std::atoi(files[3]));
  std::vector<std::unique_ptr<void, Free>> tensors;
  int done = 0;
  for (std::string word, name; calls >> word;) {
    if (word == "tensor") {
      size_t bytes;
      calls >> bytes;
      void* memory = nullptr;
      if (posix_memalign(&memory, 16, bytes)) return 2;
      data.read(static_cast<char*>(memory), static_cast<std::streamsize>(bytes));
      tensors.emplace_back(memory);
      continue;
    }
    size_t count;
    calls >> name >> count;
    std::vector<Argument> arguments(count);
    for (Argument& argument : arguments) {
      std::string kind, value;
      calls >> kind >> value;
      if (kind == "tensor") argument.pointer = tensors[std::stoul(value)].get();
      if (kind == "real") argument.real = std::stod(value);
      if (kind == "integer") argument.integer = std::stoll(value);
    }
    if (const int error = call_function(name, arguments)) {
      std::cerr << name << " returned " << error << ": " << ledom_emulation_error() << "\n";
      return 3;
    }
    tensors.clear();
    done++;
  }
  std::cout << done << " calls\n";
}
