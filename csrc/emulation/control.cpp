// Functions by which tests control the emulator in a loaded library.
#include "common/interface.h"
#include "emulation/fibers.h"

LEDOM_API void ledom_emulation_set_schedule(int schedule) { emulation::block.schedule = schedule; }

// The error of the last launch; empty if there was none.
LEDOM_API const char* ledom_emulation_error() { return emulation::block.error.c_str(); }
