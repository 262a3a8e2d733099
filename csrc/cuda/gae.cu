// Of lambda_returns too, which are gae's returns.
#include "scan_launch.cuh"

namespace fastrl::cuda {

FASTRL_LAUNCH_SCANS(Gae)

}  // namespace fastrl::cuda
