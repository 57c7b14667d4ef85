// How tests steer the emulator in a library that they have loaded.
#include "common/interface.h"
#include "emulation/fibers.h"

LEDOM_API void ledom_emulation_set_schedule(int schedule) { emulation::block.schedule = schedule; }

// What went wrong in the last launch; empty if nothing did.
LEDOM_API const char* ledom_emulation_error() { return emulation::block.error.c_str(); }
