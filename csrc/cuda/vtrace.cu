#include "scan_launch.cuh"

namespace fastrl::cuda {

FASTRL_LAUNCH_SCANS(Vtrace)
FASTRL_LAUNCH_SCANS(VtraceBackward)

}  // namespace fastrl::cuda
