// Makes the library importable as pyperf_dl._C; the operators register themselves while it is loaded.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Operators of pyperf_dl.", -1, nullptr};
  return PyModule_Create(&definition);
}
