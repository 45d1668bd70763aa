// A program that is built with torch alone, and loads the library while it runs: dlopen_test libse_ext.so.
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <cstdio>

namespace {

auto find_squeeze() {
  return c10::Dispatcher::singleton().findSchema({"se_ext::squeeze", ""});
}

// What went wrong, or nullptr.
const char* check(const char* library) {
  if (find_squeeze()) return "the op is there before the library is loaded";
  if (!dlopen(library, RTLD_NOW)) return dlerror();
  if (!find_squeeze()) return "the library did not register the op";
  const auto squeeze = find_squeeze()->typed<at::Tensor(const at::Tensor&)>();
  const at::Tensor z = squeeze.call(at::full({1, 2, 4, 4}, 3.0f));
  return at::equal(z, at::full({1, 2}, 3.0f)) ? nullptr : "squeeze gives another mean";
}

}  // namespace

int main(int count, char** arguments) {
  const char* failure = count == 2 ? check(arguments[1]) : "usage: dlopen_test libse_ext.so";
  if (failure) std::fprintf(stderr, "%s\n", failure);
  return failure ? 1 : 0;
}
