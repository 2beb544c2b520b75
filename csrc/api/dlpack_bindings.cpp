// Rows of memory as a DLPack capsule, of which any framework makes a tensor: with no look at the
// memory, no stream and no copy, and with a storage and an owner of its own.
#include "api/dlpack_bindings.h"

#include <cstdint>
#include <memory>

namespace py = pybind11;

namespace dualpipe {
namespace {

// DLManagedTensor and what it consists of, as DLPack 0.2 and all later versions lay them out; the
// names are theirs.
struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

struct Rows {
  DLManagedTensor managed;
  int64_t shape[2];
  int64_t strides[2];
  PyObject* keep;
};

// Called by whichever thread drops the last reference to the storage.
void drop(DLManagedTensor* managed) {
  auto* rows = static_cast<Rows*>(managed->manager_ctx);
  // At the end of the process there may be no interpreter to give the object back to.
  if (Py_IsInitialized()) {
    const py::gil_scoped_acquire gil;
    Py_DECREF(rows->keep);
  }
  delete rows;
}

constexpr const char* kFresh = "dltensor";

// A capsule that nobody has made a tensor of. One that has been used has another name.
void drop_unused(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, kFresh) == 0) return;
  drop(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kFresh)));
}

// [rows, columns] values, `pitch` values from one row to the next, at `address`. The values are of
// a type by its code and bits in DLPack, the memory is on a device by its type and index there.
// `keep` lives as long as the tensor's storage.
py::capsule rows_capsule(uint64_t address, int64_t rows, int64_t columns, int64_t pitch,
                         uint8_t type_code, uint8_t type_bits, int32_t device_type,
                         int32_t device_index, py::object keep) {
  auto view = std::make_unique<Rows>();
  view->shape[0] = rows;
  view->shape[1] = columns;
  view->strides[0] = pitch;
  view->strides[1] = 1;
  view->managed = {{reinterpret_cast<void*>(address),
                    {device_type, device_index},
                    2,
                    {type_code, type_bits, 1},
                    view->shape,
                    view->strides,
                    0},
                   view.get(),
                   &drop};
  PyObject* capsule = PyCapsule_New(&view->managed, kFresh, &drop_unused);
  if (capsule == nullptr) throw py::error_already_set();
  view->keep = keep.release().ptr();
  view.release();
  return py::reinterpret_steal<py::capsule>(capsule);
}

}  // namespace

void bind_dlpack(py::module_& m) {
  m.def("rows_capsule", &rows_capsule, py::arg("address"), py::arg("rows"), py::arg("columns"),
        py::arg("pitch"), py::arg("type_code"), py::arg("type_bits"), py::arg("device_type"),
        py::arg("device_index"), py::arg("keep"));
}

}  // namespace dualpipe
