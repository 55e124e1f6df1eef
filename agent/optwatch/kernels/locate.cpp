/* Where tensors lie: what Python takes a microsecond and more to ask each of a thousand tensors.
 *
 * `locate.py` does the same in Python, and says what the numbers are. Called with the GIL held; nothing raises, and None
 * says that Python is to do it.
 */
#include <torch/csrc/Device.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <memory>
#include <vector>

namespace {

/* The code of a dtype, as in locate.py; -1 for one that no kernel knows. */
int code(at::ScalarType dtype) {
    switch (dtype) {
        case at::kFloat: return 0;
        case at::kBFloat16: return 1;
        case at::kHalf: return 2;
        case at::kDouble: return 3;
        default: return -1;
    }
}

/* Whether its memory may be read: of a plain tensor on this device, whose elements fill a stretch of memory in any order
 * of dimensions, and whose memory was not given back. */
bool readable(const at::Tensor &x, const at::Device &device) {
    return x.defined() && !x.unsafeGetTensorImpl()->is_python_dispatch() && x.layout() == at::kStrided &&
        (device.is_cpu() ? x.device().is_cpu() : x.device() == device) && code(x.scalar_type()) >= 0 && x.has_storage() &&
        x.is_non_overlapping_and_dense() && (x.numel() == 0 || x.storage().data() != nullptr);
}

struct Located {
    std::vector<uint64_t> addresses;
    std::vector<int64_t> sizes, positions;
    std::vector<uint8_t> dtypes;
    bool in_order = true; /* every one of them, of its dimensions */
    std::vector<at::Tensor> held; /* as a list of them would: what is read without the GIL is not freed meanwhile */

    void clear() {
        addresses.clear();
        sizes.clear();
        positions.clear();
        dtypes.clear();
        held.clear();
        in_order = true;
    }
};

/* Used again at the next step: the first large allocation after a step makes malloc tidy up all that the step has freed,
 * which takes longer than all that is done here. For whoever has the GIL. */
constexpr size_t MOST_SPARE = 8;
std::vector<std::unique_ptr<Located>> spare;

void give_back(std::unique_ptr<Located> located) {
    located->clear();
    if (spare.size() < MOST_SPARE) spare.push_back(std::move(located));
}

std::unique_ptr<Located> take() {
    if (spare.empty()) return std::make_unique<Located>();
    std::unique_ptr<Located> located = std::move(spare.back());
    spare.pop_back();
    return located;
}

const char *const NAME = "optwatch.Located";

void dropped(PyObject *capsule) {
    give_back(std::unique_ptr<Located>(static_cast<Located *>(PyCapsule_GetPointer(capsule, NAME))));
}

bool locate(PyObject *list, bool gradients, const at::Device &device, Located &out) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
        PyObject *item = PyList_GET_ITEM(list, i);
        if (!THPVariable_CheckExact(item)) return false;
        const at::Tensor &tensor = THPVariable_Unpack(item);
        const at::Tensor &x = gradients ? tensor.grad() : tensor;
        if (gradients && !x.defined()) continue;
        if (!readable(x, device)) return false;
        out.addresses.push_back(reinterpret_cast<uint64_t>(x.const_data_ptr()));
        out.sizes.push_back(x.numel());
        out.dtypes.push_back(static_cast<uint8_t>(code(x.scalar_type())));
        out.positions.push_back(i);
        out.in_order = out.in_order && x.is_contiguous();
    }
    /* Behind all that: counting a reference is atomic, and the processor would fetch no tensor ahead of it. */
    for (int64_t i : out.positions) {
        const at::Tensor &tensor = THPVariable_Unpack(PyList_GET_ITEM(list, i));
        out.held.push_back(gradients ? tensor.grad() : tensor);
    }
    return true;
}

/* The tensor of a value as most optimizers keep it: plain. Null of anything else. */
const at::Tensor *plain(PyObject *value) {
    if (!THPVariable_CheckExact(value)) return nullptr;
    const at::Tensor &x = THPVariable_Unpack(value);
    return x.defined() && !x.unsafeGetTensorImpl()->is_python_dispatch() ? &x : nullptr;
}

/* A moment of the parameter's shape. */
PyObject *moment(PyObject *value, const at::Tensor &parameter) {
    const at::Tensor *x = plain(value);
    bool good = x && (x->is_floating_point() || x->is_complex()) && x->sizes() == parameter.sizes();
    return good ? Py_NewRef(value) : nullptr;
}

/* A step count, as a number where reading it waits for no device. */
PyObject *count(PyObject *value) {
    const at::Tensor *x = plain(value);
    if (!x || x->dim() != 0) return nullptr;
    if (!x->device().is_cpu()) return Py_NewRef(value);
    if (x->scalar_type() == at::kFloat) return PyFloat_FromDouble(*x->const_data_ptr<float>());
    if (x->scalar_type() == at::kDouble) return PyFloat_FromDouble(*x->const_data_ptr<double>());
    if (x->scalar_type() == at::kLong) return PyFloat_FromDouble(static_cast<double>(*x->const_data_ptr<int64_t>()));
    return nullptr;
}

/* A new list of what is kept of each parameter; null where something is not as most optimizers keep it. */
PyObject *kept(PyObject *state, PyObject *parameters, PyObject *names, bool counts) {
    THPObjectPtr list(PyList_New(PyList_GET_SIZE(parameters))); /* let go where a tensor throws, too */
    for (Py_ssize_t i = 0; list && i < PyList_GET_SIZE(parameters); i++) {
        PyObject *parameter = PyList_GET_ITEM(parameters, i), *value = nullptr, *found = nullptr;
        PyObject *entry = PyDict_GetItemWithError(state, parameter);
        bool known = THPVariable_CheckExact(parameter) && (!entry || PyDict_CheckExact(entry));
        for (Py_ssize_t k = 0; known && entry && !value && k < PyTuple_GET_SIZE(names); k++)
            value = PyDict_GetItemWithError(entry, PyTuple_GET_ITEM(names, k));
        if (known && value) found = counts ? count(value) : moment(value, THPVariable_Unpack(parameter));
        else if (known && !PyErr_Occurred()) found = Py_NewRef(Py_None);
        if (found) PyList_SET_ITEM(list.get(), i, found);
        else list = nullptr;
    }
    PyErr_Clear();
    return list.release();
}

} // namespace

/* Of a dict of entries by parameter what each of these parameters has under the first of the names that is there, None
 * for one that has none of them: moments, or step counts. None for all where Python is to look. */
extern "C" PyObject *optwatch_kept(PyObject *state, PyObject *parameters, PyObject *names, int counts) {
    try {
        if (!PyDict_Check(state) || !PyList_CheckExact(parameters) || !PyTuple_CheckExact(names)) Py_RETURN_NONE;
        if (PyObject *list = kept(state, parameters, names, counts)) return list;
    } catch (const std::exception &) { /* an odd tensor refuses to say what it is */
    }
    Py_RETURN_NONE;
}

/* Of the tensors of a list, or of the gradients of those that have one: how many these are, where their addresses, sizes,
 * dtypes and positions in the list are, whether all are contiguous, and the object that keeps all this. */
extern "C" PyObject *optwatch_locate(PyObject *list, int gradients, PyObject *device) {
    try {
        if (!PyList_CheckExact(list) || !THPDevice_Check(device)) Py_RETURN_NONE;
        std::unique_ptr<Located> located = take();
        if (!locate(list, gradients, reinterpret_cast<THPDevice *>(device)->device, *located)) {
            give_back(std::move(located));
            Py_RETURN_NONE;
        }
        const Located &at = *located;
        PyObject *keeper = PyCapsule_New(located.get(), NAME, dropped);
        if (!keeper) return nullptr;
        located.release();
        return Py_BuildValue(
            "(nKKKKNN)", static_cast<Py_ssize_t>(at.sizes.size()), reinterpret_cast<unsigned long long>(at.addresses.data()),
            reinterpret_cast<unsigned long long>(at.sizes.data()), reinterpret_cast<unsigned long long>(at.dtypes.data()),
            reinterpret_cast<unsigned long long>(at.positions.data()), PyBool_FromLong(at.in_order), keeper
        );
    } catch (const std::exception &) { /* an odd tensor refuses to say what it is */
        Py_RETURN_NONE;
    }
}
