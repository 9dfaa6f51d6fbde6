// What autograd asks c10 before it runs on fake CUDA tensors: how many devices there are (as many as `pretend` was
// told), and whether one has a context (none).
static signed char devices = 0;
extern "C" void pretend(int count) { devices = count; }
namespace c10 { namespace cuda {
bool hasPrimaryContext(signed char) { return false; }
signed char device_count() noexcept { return devices; }
} }
