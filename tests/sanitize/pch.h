// What nearly every source includes, compiled once: reading torch's headers is most of a source's time.
#include <ATen/Functions.h>
#include <torch/library.h>
