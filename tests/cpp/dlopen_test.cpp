// A program that is built with torch alone, and loads the library while it runs: dlopen_test libse_ext.so.
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <cstdio>

int main(int, char** arguments) {
  const auto registered = [] { return c10::Dispatcher::singleton().findSchema({"se_ext::squeeze", ""}); };
  if (registered()) return std::fprintf(stderr, "the op is there before the library is loaded\n"), 1;
  if (!dlopen(arguments[1], RTLD_NOW)) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  const auto squeeze = registered().value().typed<at::Tensor(const at::Tensor&)>();
  const at::Tensor z = squeeze.call(at::full({1, 2, 4, 4}, 3.0f));
  if (!at::equal(z, at::full({1, 2}, 3.0f))) return std::fprintf(stderr, "squeeze gives another mean\n"), 1;
}
