/* Where tensors lie: what Python takes a microsecond and more to ask each of a thousand tensors.
 *
 * `locate.py` does the same in Python, and says what the numbers are. Called with the GIL held; nothing raises, and None
 * says that Python is to do it.
 */
#include <torch/csrc/Device.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
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

constexpr size_t LINE = 64;

/* Ask for the memory that an object takes, without waiting for it; for nothing where there is none. */
void ahead(const void *object, size_t bytes) {
    for (size_t at = 0; at < bytes; at += LINE) __builtin_prefetch(static_cast<const char *>(object) + at);
}

void ahead(const at::Tensor &x) { ahead(x.unsafeGetTensorImpl(), sizeof(at::TensorImpl)); }

/* How many are looked at together. Behind a step nothing is in a cache, and one object points at the next: passes over
 * many, each of which asks for what the next one looks at, wait for memory once instead of once for each object. */
constexpr Py_ssize_t TOGETHER = 64;

/* Take down where these lie, each with its position in the list, those that are null or undefined left out; false where
 * one may not be read. */
bool take_down(const at::Tensor *const *tensors, Py_ssize_t count, Py_ssize_t first, const at::Device &device, Located &out) {
    auto there = [&](Py_ssize_t i) { return tensors[i] && tensors[i]->defined(); };
    for (Py_ssize_t i = 0; i < count; i++)
        if (there(i) && tensors[i]->has_storage())
            ahead(tensors[i]->unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl(), sizeof(c10::StorageImpl));
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!there(i)) continue;
        const at::Tensor &x = *tensors[i];
        if (!readable(x, device)) return false;
        out.addresses.push_back(reinterpret_cast<uint64_t>(x.const_data_ptr()));
        out.sizes.push_back(x.numel());
        out.dtypes.push_back(static_cast<uint8_t>(code(x.scalar_type())));
        out.positions.push_back(first + i);
        out.in_order = out.in_order && x.is_contiguous();
    }
    /* Behind all that: counting a reference is atomic, and the processor would fetch no tensor ahead of it. */
    for (Py_ssize_t i = 0; i < count; i++)
        if (there(i)) out.held.push_back(*tensors[i]);
    return true;
}

bool locate(PyObject *list, bool gradients, const at::Device &device, Located &out) {
    const at::Tensor *found[TOGETHER];
    for (Py_ssize_t first = 0, all = PyList_GET_SIZE(list); first < all; first += TOGETHER) {
        Py_ssize_t count = std::min(TOGETHER, all - first);
        PyObject **items = PySequence_Fast_ITEMS(list) + first;
        for (Py_ssize_t i = 0; i < count; i++) ahead(items[i], sizeof(THPVariable));
        for (Py_ssize_t i = 0; i < count; i++) {
            if (!THPVariable_CheckExact(items[i])) return false;
            ahead(*(found[i] = &THPVariable_Unpack(items[i])));
        }
        if (gradients) {
            for (Py_ssize_t i = 0; i < count; i++) ahead(found[i]->unsafeGetTensorImpl()->autograd_meta(), 2 * LINE);
            for (Py_ssize_t i = 0; i < count; i++) ahead(*(found[i] = &found[i]->unsafeGetTensorImpl()->grad()));
        }
        if (!take_down(found, count, first, device, out)) return false;
    }
    return true;
}

/* The tensor of a value as most optimizers keep it: plain. Null of anything else. */
const at::Tensor *plain(PyObject *value) {
    if (!THPVariable_CheckExact(value)) return nullptr;
    const at::Tensor &x = THPVariable_Unpack(value);
    return x.defined() && !x.unsafeGetTensorImpl()->is_python_dispatch() ? &x : nullptr;
}

/* What an optimizer's state has under the first of these names that is there, of some parameters: borrowed, null where
 * there is none. False where something is not as most optimizers keep it. */
bool values(PyObject *state, PyObject **parameters, Py_ssize_t count, PyObject *names, PyObject **out) {
    PyObject *entries[TOGETHER];
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!THPVariable_CheckExact(parameters[i])) return false;
        /* What hash() says of a tensor: its own __hash__ is in Python, and takes as long as all the rest. */
        entries[i] = _PyDict_GetItem_KnownHash(state, parameters[i], reinterpret_cast<Py_hash_t>(parameters[i]));
        if (entries[i]) ahead(entries[i], sizeof(PyDictObject));
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (entries[i] && !PyDict_Check(entries[i])) return false;
        if (entries[i]) ahead(reinterpret_cast<PyDictObject *>(entries[i])->ma_keys, 3 * LINE);
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        out[i] = nullptr;
        for (Py_ssize_t k = 0; entries[i] && !out[i] && k < PyTuple_GET_SIZE(names); k++)
            out[i] = PyDict_GetItemWithError(entries[i], PyTuple_GET_ITEM(names, k));
        if (out[i]) ahead(out[i], sizeof(THPVariable));
    }
    return !PyErr_Occurred();
}

/* Call `work` with some parameters at a time, the position of the first, and their values; whether it liked them all. */
template <typename Work>
bool each(PyObject *state, PyObject *parameters, PyObject *names, Work work) {
    for (Py_ssize_t first = 0, all = PyList_GET_SIZE(parameters); first < all; first += TOGETHER) {
        Py_ssize_t count = std::min(TOGETHER, all - first);
        PyObject **some = PySequence_Fast_ITEMS(parameters) + first, *found[TOGETHER];
        if (!values(state, some, count, names, found) || !work(some, found, count, first)) return false;
    }
    return true;
}

/* Moments: plain tensors of their parameter's shape. */
bool moments(PyObject *state, PyObject *parameters, PyObject *names, const at::Device &device, Located &out) {
    return each(state, parameters, names, [&](PyObject **some, PyObject **found, Py_ssize_t count, Py_ssize_t first) {
        const at::Tensor *tensors[TOGETHER];
        for (Py_ssize_t i = 0; i < count; i++) {
            tensors[i] = found[i] ? plain(found[i]) : nullptr;
            if (found[i] && !tensors[i]) return false;
            if (tensors[i]) ahead(*tensors[i]);
        }
        for (Py_ssize_t i = 0; i < count; i++)
            if (tensors[i] && tensors[i]->sizes() != THPVariable_Unpack(some[i]).sizes()) return false;
        return take_down(tensors, count, first, device, out);
    });
}

/* A step count that is kept on the CPU. False of anything else. */
bool count_of(const at::Tensor *x, double &out) {
    if (!x || x->dim() != 0 || !x->device().is_cpu()) return false;
    if (x->scalar_type() == at::kFloat) out = *x->const_data_ptr<float>();
    else if (x->scalar_type() == at::kDouble) out = *x->const_data_ptr<double>();
    else if (x->scalar_type() == at::kLong) out = static_cast<double>(*x->const_data_ptr<int64_t>());
    else return false;
    return true;
}

/* The step count that all of these share. False where they share none. */
bool shared(PyObject *state, PyObject *parameters, PyObject *names, double &out) {
    return each(state, parameters, names, [&](PyObject **, PyObject **found, Py_ssize_t count, Py_ssize_t first) {
        for (Py_ssize_t i = 0; i < count; i++) {
            double own;
            if (!found[i] || !count_of(plain(found[i]), own) || (first + i && own != out)) return false;
            out = own;
        }
        return true;
    });
}

/* For Python: how many, where their addresses, sizes, dtypes and positions in the list are, whether all are contiguous,
 * and the object that keeps all this. */
PyObject *told(std::unique_ptr<Located> located) {
    const Located &at = *located;
    PyObject *keeper = PyCapsule_New(located.get(), NAME, dropped);
    if (!keeper) return nullptr;
    located.release();
    return Py_BuildValue(
        "(nKKKKNN)", static_cast<Py_ssize_t>(at.sizes.size()), reinterpret_cast<unsigned long long>(at.addresses.data()),
        reinterpret_cast<unsigned long long>(at.sizes.data()), reinterpret_cast<unsigned long long>(at.dtypes.data()),
        reinterpret_cast<unsigned long long>(at.positions.data()), PyBool_FromLong(at.in_order), keeper
    );
}

/* Whether this is an optimizer's state, the list of parameters and a tuple of names that `values` can work with. */
bool usual(PyObject *state, PyObject *parameters, PyObject *names) {
    if (!PyDict_Check(state) || !PyList_CheckExact(parameters) || !PyTuple_CheckExact(names)) return false;
    if (!PyList_GET_SIZE(parameters)) return false;
    PyObject *first = PyList_GET_ITEM(parameters, 0);
    return THPVariable_CheckExact(first) && PyObject_Hash(first) == reinterpret_cast<Py_hash_t>(first);
}

/* What `work` has found and told; None where it could not, or a tensor refuses to say what it is. */
template <typename Work>
PyObject *told_of(Work work) {
    try {
        std::unique_ptr<Located> located = take();
        if (work(*located)) return told(std::move(located));
        give_back(std::move(located));
    } catch (const std::exception &) {
    }
    PyErr_Clear();
    Py_RETURN_NONE;
}

} // namespace

/* Of the tensors of a list, or of the gradients of those that have one: see `told`. None where Python is to look. */
extern "C" PyObject *optwatch_locate(PyObject *list, int gradients, PyObject *device) {
    if (!PyList_CheckExact(list) || !THPDevice_Check(device)) Py_RETURN_NONE;
    return told_of([&](Located &out) { return locate(list, gradients, reinterpret_cast<THPDevice *>(device)->device, out); });
}

/* Of one tensor on a CPU its address, elements and dtype. */
extern "C" PyObject *optwatch_place(PyObject *tensor) {
    if (!THPVariable_CheckExact(tensor)) Py_RETURN_NONE;
    const at::Tensor &x = THPVariable_Unpack(tensor);
    try {
        if (readable(x, at::kCPU))
            return Py_BuildValue(
                "(KLi)", reinterpret_cast<unsigned long long>(x.const_data_ptr()), static_cast<long long>(x.numel()),
                code(x.scalar_type())
            );
    } catch (const std::exception &) {
    }
    Py_RETURN_NONE;
}

/* As `optwatch_locate`, of what a dict of entries by parameter has of each of these: under the first of the names that is
 * there. */
extern "C" PyObject *optwatch_moments(PyObject *state, PyObject *parameters, PyObject *names, PyObject *device) {
    if (!usual(state, parameters, names) || !THPDevice_Check(device)) Py_RETURN_NONE;
    const at::Device &on = reinterpret_cast<THPDevice *>(device)->device;
    return told_of([&](Located &out) { return moments(state, parameters, names, on, out); });
}

/* The step count that all of these parameters have there, on the CPU; None where they share none. */
extern "C" PyObject *optwatch_shared_count(PyObject *state, PyObject *parameters, PyObject *names) {
    double found = 0;
    try {
        if (usual(state, parameters, names) && shared(state, parameters, names, found)) return PyFloat_FromDouble(found);
    } catch (const std::exception &) {
    }
    PyErr_Clear();
    Py_RETURN_NONE;
}
