#include "python/reading.h"

#include <torch/csrc/autograd/python_variable.h>

#include <vector>

#include "ops/checks.h"

namespace gc {

namespace {

// Python's names, made once and kept: a look-up by them compares addresses.
PyObject* name_of(const char* text) { return PyUnicode_InternFromString(text); }

struct Names {
  PyObject* const modules = name_of("_modules");
  PyObject* const parameters = name_of("_parameters");
  PyObject* const forward = name_of("forward");
  PyObject* const conv_forward = name_of("_conv_forward");
  PyObject* const call = name_of("_call_impl");
  PyObject* const compiled_call = name_of("_compiled_call_impl");
  PyObject* const hooks[4] = {name_of("_forward_hooks"), name_of("_forward_pre_hooks"), name_of("_backward_hooks"),
                              name_of("_backward_pre_hooks")};
};

const Names& names() {
  static const Names& kept = *new Names;  // never destroyed: Python may be gone by then
  return kept;
}

// A borrowed reference to dict[key], or null; raises nothing.
PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* const found = PyDict_GetItemWithError(dict, key);
  if (found == nullptr) PyErr_Clear();
  return found;
}

// The number that Python gives to a class as it is: it changes with the class and with everything that it inherits.
// 0 where there is none, which nothing equals.
unsigned version_of(PyTypeObject* type) {
#if PY_VERSION_HEX < 0x030C0000
  if ((type->tp_flags & Py_TPFLAGS_VALID_VERSION_TAG) == 0) return 0;
#endif
  return type->tp_version_tag;
}

// A module that was looked at. Nothing here keeps a module alive, so that a block can die: its parts are looked at only
// after the module that holds them has been found to hold that very address, and then in all that was seen of them.
struct Seen {
  PyObject* module;
  unsigned version;                                          // of its class
  bool is_part = false;                                      // calling it does nothing but its class's forward
  std::vector<std::pair<PyObject*, py::object>> attributes;  // in its own dictionary; null where there was no such key
  std::vector<std::pair<PyObject*, PyObject*>> children;     // likewise
  bool all_children = false;                                 // these are all that there are, in their order
};

bool same_attributes(const Seen& seen, PyObject* dict) {
  for (const auto& [key, value] : seen.attributes) {
    if (item(dict, key) != value.ptr()) return false;
  }
  return true;
}

bool same_children(const Seen& seen, PyObject* modules) {
  if (!seen.all_children) {
    for (const auto& [key, value] : seen.children) {
      if (item(modules, key) != value) return false;
    }
    return true;
  }
  if (PyDict_Size(modules) != static_cast<Py_ssize_t>(seen.children.size())) return false;
  Py_ssize_t position = 0;
  PyObject* value = nullptr;
  for (const auto& [key, child] : seen.children) {
    if (!PyDict_Next(modules, &position, nullptr, &value) || value != child) return false;
  }
  return true;
}

// Whether the module's own dictionary changes nothing about what calling the module does.
bool is_untouched(PyObject* dict) {
  for (PyObject* const hooks : names().hooks) {
    PyObject* const found = item(dict, hooks);
    if (found != nullptr && found != Py_None && PyObject_Size(found) != 0) return false;
  }
  for (PyObject* const method : {names().forward, names().conv_forward, names().call}) {
    if (item(dict, method) != nullptr) return false;
  }
  PyObject* const compiled = item(dict, names().compiled_call);
  return compiled == nullptr || compiled == Py_None;
}

bool holds(const Seen& seen) {
  const unsigned version = version_of(Py_TYPE(seen.module));
  if (version == 0 || version != seen.version) return false;
  const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(seen.module, nullptr));
  if (!dict) throw py::error_already_set();
  if (seen.is_part && !is_untouched(dict.ptr())) return false;
  if (!same_attributes(seen, dict.ptr())) return false;
  if (seen.children.empty()) return true;
  PyObject* const modules = item(dict.ptr(), names().modules);
  return modules != nullptr && PyDict_Check(modules) && same_children(seen, modules);
}

// module.name, found where nn.Module keeps parameters, by the subscript of that dictionary (DeepSpeed's gathers a
// parameter there); else by the attribute, as for a parametrization.
py::object parameter(PyObject* module, PyObject* name) {
  const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
  PyObject* const held = dict ? item(dict.ptr(), names().parameters) : nullptr;
  if (held != nullptr && PyDict_Contains(held, name) == 1) {
    if (PyDict_CheckExact(held)) return py::reinterpret_borrow<py::object>(item(held, name));
    return py::reinterpret_steal<py::object>(PyObject_GetItem(held, name));
  }
  PyErr_Clear();
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(module, name));
}

// A plain dense tensor on a device that is served, in a type that is: no subclass, nothing wrapped by a transform.
const at::Tensor* plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  constexpr c10::DispatchKeySet kWrapped{
      c10::DispatchKey::Batched,       c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
      c10::DispatchKey::Functionalize, c10::DispatchKey::Python,           c10::DispatchKey::NestedTensor};
  if (tensor.layout() != at::kStrided || tensor.key_set().has_any(kWrapped)) return nullptr;
  return tensor.is_cpu() || tensor.is_cuda() || tensor.is_meta() ? &tensor : nullptr;
}

// Whether the operators take it for a parameter beside x.
bool fits(PyObject* object, const at::Tensor& x) {
  if (object == Py_None) return true;
  const at::Tensor* const tensor = plain(object);
  return tensor != nullptr && tensor->device() == x.device() && type_fits(*tensor, x);
}

class Reading {
 public:
  // Calling it was found to do nothing but its class's forward.
  void part(const py::object& module) { seen(module).is_part = true; }

  void attribute(const py::object& module, const py::str& name) {
    PyObject* const key = interned(name);
    const auto value = py::reinterpret_borrow<py::object>(item(dictionary(module).ptr(), key));
    seen(module).attributes.emplace_back(key, value);
  }

  void child(const py::object& module, const py::str& name) {
    PyObject* const key = interned(name);
    PyObject* const value = item(children(module).ptr(), key);
    seen(module).children.emplace_back(key, value);
    if (value == nullptr) attribute(module, name);  // a part that is not there is an attribute, None
  }

  void all_children(const py::object& module) {
    Seen& at = seen(module);
    at.children.clear();
    for (const auto& [name, value] : children(module)) {
      at.children.emplace_back(interned(py::reinterpret_borrow<py::str>(name)), value.ptr());
    }
    at.all_children = true;
  }

  // A dictionary that was empty.
  void empty(const py::dict& dict) { empty_.push_back(dict); }

  // What a dictionary holds under a name, perhaps nothing.
  void entry(const py::dict& dict, const py::str& name) {
    PyObject* const key = interned(name);
    entries_.push_back({dict, key, py::reinterpret_borrow<py::object>(item(dict.ptr(), key))});
  }

  // The instructions of a function in Python, and its defaults.
  void function(const py::object& function) {
    TORCH_CHECK_TYPE(PyFunction_Check(function.ptr()), "a function in Python is looked at");
    functions_.push_back({function, kept(PyFunction_GetCode(function.ptr())),
                          kept(PyFunction_GetDefaults(function.ptr())),
                          kept(PyFunction_GetKwDefaults(function.ptr()))});
  }

  // The parameters, in the order in which current() returns them, and the group that each is of.
  void parameter(const py::object& module, const py::str& name, int group) {
    TORCH_CHECK(group >= 0 && group < kGroups, "group must be one of 0 to ", kGroups - 1, ", got ", group);
    seen(module);
    parameters_.push_back({module.ptr(), interned(name), group});
    ++counts_[group];
  }

  // None where something that was seen has changed. Else (fits, group 0, group 1, …): every group a tuple of the
  // parameters as they are now, and whether the operators take x and all of them.
  py::object current(const py::object& x) const {
    for (const py::object& dict : empty_) {
      if (PyDict_Size(dict.ptr()) != 0) return py::none();
    }
    for (const Entry& entry : entries_) {
      if (item(entry.dict.ptr(), entry.key) != entry.value.ptr()) return py::none();
    }
    for (const Function& one : functions_) {
      if (PyFunction_GetCode(one.function.ptr()) != one.code.ptr() ||
          PyFunction_GetDefaults(one.function.ptr()) != one.defaults.ptr() ||
          PyFunction_GetKwDefaults(one.function.ptr()) != one.keyword_defaults.ptr()) {
        return py::none();
      }
    }
    for (const Seen& one : seen_) {
      if (!holds(one)) return py::none();
    }
    const at::Tensor* const map = plain(x.ptr());
    bool all_fit = map != nullptr && map->dim() == 4 && is_served(map->scalar_type());
    py::tuple groups[kGroups];
    Py_ssize_t taken[kGroups] = {};
    for (int g = 0; g < kGroups; ++g) groups[g] = py::tuple(counts_[g]);
    for (const Wanted& wanted : parameters_) {
      py::object value = gc::parameter(wanted.module, wanted.name);
      if (!value) throw py::error_already_set();
      all_fit = all_fit && fits(value.ptr(), *map);
      PyTuple_SET_ITEM(groups[wanted.group].ptr(), taken[wanted.group]++, value.release().ptr());
    }
    py::tuple result(1 + kGroups);
    PyTuple_SET_ITEM(result.ptr(), 0, py::bool_(all_fit).release().ptr());
    for (int g = 0; g < kGroups; ++g) PyTuple_SET_ITEM(result.ptr(), 1 + g, groups[g].release().ptr());
    return std::move(result);
  }

 private:
  static constexpr int kGroups = 3;  // of the mask, of add, of mul

  struct Wanted {
    PyObject* module;
    PyObject* name;
    int group;
  };

  struct Entry {
    py::dict dict;
    PyObject* key;
    py::object value;  // null where there was none
  };

  struct Function {
    py::object function, code, defaults, keyword_defaults;  // the last two null where there are none
  };

  // Perhaps null.
  static py::object kept(PyObject* borrowed) { return py::reinterpret_borrow<py::object>(borrowed); }

  // An interned string lives as long as the process here: there are few names.
  static PyObject* interned(const py::str& name) {
    PyObject* text = name.ptr();
    Py_INCREF(text);
    PyUnicode_InternInPlace(&text);
    return text;
  }

  static py::dict dictionary(const py::object& module) { return module.attr("__dict__"); }
  static py::dict children(const py::object& module) { return dictionary(module)["_modules"]; }

  // What is noted of it. Anything but the first, the block itself, must be a child that was looked at: only so is it
  // known to live when it is looked at again.
  Seen& seen(const py::object& module) {
    for (Seen& one : seen_) {
      if (one.module == module.ptr()) return one;
    }
    TORCH_CHECK(seen_.empty() || is_child(module.ptr()), "a part is looked at through the module that holds it first");
    py::type::of(module).attr("forward");  // a look-up, after which the class has a version
    seen_.push_back({module.ptr(), version_of(Py_TYPE(module.ptr()))});
    return seen_.back();
  }

  bool is_child(PyObject* module) const {
    for (const Seen& one : seen_) {
      for (const auto& [key, child] : one.children) {
        if (child == module) return true;
      }
    }
    return false;
  }

  std::vector<py::object> empty_;
  std::vector<Entry> entries_;
  std::vector<Function> functions_;
  std::vector<Seen> seen_;
  std::vector<Wanted> parameters_;
  Py_ssize_t counts_[kGroups] = {};
};

}  // namespace

void bind_reading(pybind11::module_& module) {
  py::class_<Reading>(module, "Reading", "What the reader of a block has seen; see gc_cuda/blocks/_parts.py.")
      .def(py::init<>())
      .def("part", &Reading::part, "Calling the module does nothing but its class's forward.")
      .def("attribute", &Reading::attribute, "The module's attribute of that name was looked at.")
      .def("child", &Reading::child, "The module's child of that name was looked at, which may be absent.")
      .def("all_children", &Reading::all_children, "The module's children were looked at, all, in their order.")
      .def("empty", &Reading::empty, "The dictionary was found empty.")
      .def("entry", &Reading::entry, "What the dictionary holds under that name was looked at; it may be absent.")
      .def("function", &Reading::function, "The function in Python was read, and had these instructions.")
      .def("parameter", &Reading::parameter, "A parameter that the block computes with, and its group.")
      .def("current", &Reading::current,
           "None if anything has changed; else (whether x and the parameters fit, and the parameters, by groups).");
}

}  // namespace gc
