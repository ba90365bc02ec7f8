// The Python module of the host check: the device code of csrc/cuda on memory and pointers that tests/kernels gives it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cuda/q_sample.cuh"
#include "cuda/random.cuh"
#include "cuda/solver_step.cuh"
#include "host_check/faults.h"
#include "host_check/guarded_memory.h"

namespace py = pybind11;

namespace host_check {
namespace {

// Keyword arguments by name; pointers are integers, 0 for none.
class Arguments {
 public:
  explicit Arguments(const py::kwargs& values) : values_(values) {}

  template <typename T>
  T get(const char* name) const {
    return values_[name].cast<T>();
  }
  template <typename T>
  T* pointer(const char* name) const {
    return reinterpret_cast<T*>(get<uintptr_t>(name));
  }
  // (pointer, stride)
  diffgap::Index index(const char* name) const {
    const auto [pointer, stride] = get<std::pair<uintptr_t, int64_t>>(name);
    return {reinterpret_cast<const int64_t*>(pointer), stride};
  }
  // (pointer, is_float64, rows, columns)
  diffgap::Table table() const {
    const auto [pointer, is_float64, rows, columns] = get<std::tuple<uintptr_t, bool, int64_t, int>>("table");
    return {reinterpret_cast<const void*>(pointer), is_float64, rows, columns};
  }
  diffgap::NoisingArgs noising() const {
    return {get<int64_t>("samples"), get<int64_t>("count"), index("t"), table(), get<int64_t>("target")};
  }
  int threads() const { return get<int>("threads"); }

 private:
  const py::kwargs& values_;
};

template <typename Function>
void for_dtype(const std::string& dtype, const Function& body) {
  if (dtype == "float32") return body(float{});
  if (dtype == "float16") return body(diffgap::Half{});
  if (dtype == "bfloat16") return body(diffgap::BFloat16{});
  throw std::invalid_argument("dtype: unknown " + dtype);
}

void normal(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  diffgap::launch_normal({a.get<int64_t>("samples"), a.get<int64_t>("count"), a.index("seeds"), a.index("steps"),
                          a.get<uint32_t>("step"), a.get<uint32_t>("stream"), a.pointer<float>("out")},
                         nullptr, a.threads());
}

void q_sample(const std::string& dtype, const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    diffgap::launch_q_sample<T>({a.noising(), a.index("seeds"), a.pointer<const T>("x0"), a.pointer<T>("x_t"),
                                 a.pointer<T>("wanted"), a.pointer<T>("noise")},
                                nullptr, a.threads());
  });
}

void q_sample_backward(const std::string& dtype, const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    diffgap::launch_q_sample_backward<T>(
        {a.noising(), a.pointer<const T>("grad_x_t"), a.pointer<const T>("grad_target"), a.pointer<T>("grad_x0")},
        nullptr, a.threads());
  });
}

void solver_step(const std::string& dtype, const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    diffgap::StepArgs<T> args{};
    args.samples = a.get<int64_t>("samples");
    args.count = a.get<int64_t>("count");
    args.row_length = a.get<int64_t>("row_length");
    args.table = a.table();
    args.steps = a.index("steps");
    args.step = a.get<int64_t>("step");
    args.seeds = a.index("seeds");
    args.sample = a.pointer<const T>("sample");
    args.output = a.pointer<const T>("output");
    args.unconditional = a.pointer<const T>("unconditional");
    args.last = a.pointer<const T>("last");
    args.h1 = a.pointer<const T>("h1");
    args.h2 = a.pointer<const T>("h2");
    args.h3 = a.pointer<const T>("h3");
    args.guidance = {a.get<float>("guidance_scale"), a.get<bool>("offset_form")};
    args.rescale = a.get<float>("rescale");
    args.limit = a.get<float>("limit");
    args.x0_norm = a.get<float>("x0_norm");
    args.next = a.pointer<T>("next");
    args.x0 = a.pointer<T>("x0");
    args.corrected = a.pointer<T>("corrected");
    diffgap::launch_solver_step(args, nullptr, a.threads());
  });
}

py::dict last_launch_of() {
  const Launch launch = last_launch();
  py::dict result;
  result["grid"] = py::make_tuple(launch.grid.x, launch.grid.y);
  result["block"] = py::make_tuple(launch.block.x, launch.block.y);
  return result;
}

}  // namespace
}  // namespace host_check

PYBIND11_MODULE(host_check, m) {
  using namespace host_check;
  py::class_<GuardedMemory>(m, "Memory", py::buffer_protocol())
      .def(py::init<size_t, bool, size_t>(), py::arg("bytes"), py::arg("at_end"), py::arg("shift"))
      .def("allow_writes", &GuardedMemory::allow_writes)
      .def("intact", &GuardedMemory::intact)
      .def_buffer([](GuardedMemory& memory) {
        auto* data = reinterpret_cast<unsigned char*>(memory.data());
        return py::buffer_info(data, static_cast<py::ssize_t>(memory.bytes()));
      });
  m.def("set_reversed", &set_reversed);
  m.attr("threads") = diffgap::kThreads;
  m.def("set_grid_limit", &set_grid_limit);
  m.def("last_launch", &last_launch_of);
  m.def("launches", &launches);
  m.def("normal", &normal);
  m.def("q_sample", &q_sample);
  m.def("q_sample_backward", &q_sample_backward);
  m.def("solver_step", &solver_step);
  m.def("fault", &run_fault);
}
