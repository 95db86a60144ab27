"""Compiled tree ensembles, and a reader of the ONNX attributes that hold them.

`Trees` owns a forest in C (forest.h) and runs it over a batch with the GIL released. `read_attribute` decodes one
attribute of an ONNX node. The attributes of an ensemble may have 100,000 entries each, for which a reader in Python
would need seconds.
"""

import os

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

import numpy as np
cimport numpy as cnp

from shorttail.errors import Internal, InvalidArgument

cnp.import_array()

cdef extern from "forest.h" nogil:
    enum: ST_OK, ST_NO_MEMORY, ST_BAD_CHILD, ST_SHARED, ST_NO_WEIGHT, ST_BAD_TARGET
    enum: ST_ONE_TARGET, ST_ALL_TARGETS
    ctypedef struct st_forest_graph:
        size_t n_nodes, n_trees
        const int32_t *feature
        const int32_t *yes
        const int32_t *no
        const uint8_t *mode
        const uint8_t *missing_yes
        const double *threshold
        const uint32_t *root
        const uint32_t *weight_begin
        const int32_t *weight_target
        const double *weight
        const uint32_t *set_begin
        const double *set_value
    ctypedef struct st_forest_tree:
        uint32_t words
    ctypedef struct st_forest:
        uint32_t n_features, n_targets, n_trees, n_steps, n_leaves
        int wide, wide_scores, aggregate, post_transform, votes, classifier, one_class_votes, all_positive
        uint32_t n_base
        double *base
        st_forest_tree *trees
    ctypedef struct st_kernel:
        const char *name
    int st_forest_build(st_forest *, const st_forest_graph *)
    void st_forest_free(st_forest *)
    int st_forest_run(const st_forest *, const st_kernel *, const void *, size_t, size_t, int, int64_t *, void *)
    int st_forest_reach(const st_forest *, const st_kernel *, const void *, size_t, size_t, uint8_t *, const int64_t *, uint8_t *)
    const st_kernel *st_kernel_choose(const char *)

REASONS = {
    ST_NO_MEMORY: "there is not enough memory",
    ST_BAD_CHILD: "a branch leads to a node that does not exist",
    ST_SHARED: "its trees share too many nodes, or contain a cycle",
    ST_NO_WEIGHT: "a leaf has no weight",
    ST_BAD_TARGET: "a weight belongs to a target that does not exist",
}


def simd_level():
    """Return the vector instructions in use: "avx512", "avx2" or "scalar". $SHORTTAIL_SIMD forces one of them.

    Raises InvalidArgument if $SHORTTAIL_SIMD names one that this CPU or build lacks.
    """
    return _kernel().decode()


cdef bytes _kernel():
    return _choose().name


cdef const st_kernel *_choose() except NULL:
    wanted = os.environ.get("SHORTTAIL_SIMD") or None
    cdef bytes level = wanted.encode() if wanted else None
    cdef const st_kernel *kernel = st_kernel_choose(<const char *>level if level is not None else NULL)
    if kernel is NULL:
        raise InvalidArgument(
            f"SHORTTAIL_SIMD={wanted}: this CPU has no such level; give avx512, avx2 or scalar, or leave it unset"
        )
    return kernel


cdef class Trees:
    """A compiled forest. Its arguments are keywords; arrays are C-contiguous NumPy arrays:

    feature, yes, no: int32 [nodes]; yes and no are node numbers. mode: uint8 [nodes] (0 leaf, 1 <=, 2 <, 3 >=, 4 >, 5
    ==, 6 !=, 7 member, 8 member after dropping the value's fraction). missing_yes: uint8 [nodes], 1 if a missing value
    goes to yes. threshold: float64 [nodes]. root: uint32 [trees], node numbers. weight_begin, set_begin: uint32 [nodes
    + 1], offsets into the next arrays. weight_target: int32, weight: float64, one entry per weight of a leaf.
    set_value: float64, the members of sets. base: float64, none, one or n_targets base values.

    wide: rows and sums are doubles. wide_scores: scores are doubles too. aggregate, post_transform: codes of forest.h.
    classifier: the forest also returns classes. one_class_votes, all_positive: for two classes, see forest_scores.h.

    Raises ValueError, with a reason for the user, if the nodes are not a forest; InvalidArgument for $SHORTTAIL_SIMD.
    """

    cdef st_forest forest
    cdef const st_kernel *kernel
    cdef readonly int n_features, n_targets, n_trees, n_leaves, n_nodes
    cdef readonly bint wide, classifier

    def __cinit__(
        self, *,
        const int32_t[::1] feature, const int32_t[::1] yes, const int32_t[::1] no, const uint8_t[::1] mode,
        const uint8_t[::1] missing_yes, const double[::1] threshold, const uint32_t[::1] root,
        const uint32_t[::1] weight_begin, const int32_t[::1] weight_target, const double[::1] weight,
        const uint32_t[::1] set_begin, const double[::1] set_value, const double[::1] base,
        int n_targets, bint wide, bint wide_scores, int aggregate, int post_transform, bint classifier,
        bint one_class_votes, bint all_positive,
    ):
        cdef st_forest_graph s
        cdef Py_ssize_t n = mode.shape[0]
        cdef int code
        _check(n > 0 and root.shape[0] > 0 and n_targets > 0, "it has no trees")
        _check(n < 2**31 - 1 and feature.shape[0] == n and yes.shape[0] == n and no.shape[0] == n
               and missing_yes.shape[0] == n and threshold.shape[0] == n and weight_begin.shape[0] == n + 1
               and set_begin.shape[0] == n + 1 and weight_target.shape[0] == weight.shape[0]
               and weight_begin[n] == weight.shape[0] and set_begin[n] == set_value.shape[0],
               "its arrays differ in length")
        s.n_nodes = n
        s.n_trees = root.shape[0]
        s.feature, s.yes, s.no = &feature[0], &yes[0], &no[0]
        s.mode, s.missing_yes, s.threshold, s.root = &mode[0], &missing_yes[0], &threshold[0], &root[0]
        s.weight_begin, s.set_begin = &weight_begin[0], &set_begin[0]
        s.weight_target = &weight_target[0] if weight.shape[0] else NULL
        s.weight = &weight[0] if weight.shape[0] else NULL
        s.set_value = &set_value[0] if set_value.shape[0] else NULL
        self.forest.n_targets = n_targets
        self.forest.wide = wide
        self.forest.wide_scores = wide_scores
        self.forest.aggregate = aggregate
        self.forest.post_transform = post_transform
        self.forest.classifier = classifier
        self.forest.one_class_votes = one_class_votes
        self.forest.all_positive = all_positive
        self.forest.n_base = <uint32_t>base.shape[0]
        self.forest.base = <double *>malloc((base.shape[0] + 1) * sizeof(double))
        if self.forest.base is NULL:
            raise MemoryError
        if base.shape[0]:
            memcpy(self.forest.base, &base[0], base.shape[0] * sizeof(double))
        self.kernel = _choose()
        with nogil:
            code = st_forest_build(&self.forest, &s)
        if code == ST_NO_MEMORY:
            raise MemoryError
        if code != ST_OK:
            raise ValueError(REASONS.get(code, "it is too large"))
        self.n_features = self.forest.n_features
        self.n_targets = self.forest.n_targets
        self.n_trees = self.forest.n_trees
        self.n_leaves = self.forest.n_leaves
        self.n_nodes = n
        self.wide = wide
        self.classifier = classifier

    def __dealloc__(self):
        st_forest_free(&self.forest)

    @property
    def simd(self):
        """The vector instructions that this forest uses."""
        return self.kernel.name.decode()

    @property
    def votes(self):
        """How leaves vote: each tree for "one" target, every leaf for "all" targets, or leaves for "some" targets."""
        return "one" if self.forest.votes == ST_ONE_TARGET else "all" if self.forest.votes == ST_ALL_TARGETS else "some"

    @property
    def n_bitvector_trees(self):
        """The number of trees that are small enough for bitvector evaluation; the others use descent."""
        cdef uint32_t t
        cdef int n = 0
        for t in range(self.forest.n_trees):
            n += self.forest.trees[t].words > 0
        return n

    cdef cnp.ndarray _matrix(self, rows):
        """Return the rows as a C-contiguous matrix. Raises Internal for other types or shapes than `run` takes."""
        if not cnp.PyArray_Check(rows):
            raise Internal("the model failed: its input is not an array")
        cdef cnp.ndarray x = rows
        cdef int wanted = cnp.NPY_DOUBLE if self.wide else cnp.NPY_FLOAT
        if x.ndim != 2 or cnp.PyArray_TYPE(x) != wanted or x.shape[1] < self.n_features:
            raise Internal(
                f"the model failed: its input must be a {'float64' if self.wide else 'float32'} matrix with at least "
                f"{self.n_features} columns, not {x.dtype} {rows.shape}"
            )
        return x if cnp.PyArray_IS_C_CONTIGUOUS(x) else np.ascontiguousarray(x)

    def run(self, rows):
        """Evaluate the forest for rows: float32 (float64 if wide) [n, n_features or more]. Releases the GIL.

        Returns (class numbers int64 [n], or None for a regressor; scores [n, n_targets]). Raises Internal for other
        types or shapes.
        """
        return self._run(self._matrix(rows), &self.forest, False)

    def run_alone(self, rows):
        """Evaluate the rows as `run` does, but one by one, as in batches of one row."""
        return self._run(self._matrix(rows), &self.forest, True)

    def run_raw(self, rows):
        """Evaluate the forest as `run` does, without its post-transform."""
        cdef st_forest raw = self.forest  # a copy of the struct; the arrays stay this object's
        raw.post_transform = 0
        return self._run(self._matrix(rows), &raw, False)

    cdef tuple _run(self, cnp.ndarray x, const st_forest *forest, bint alone):
        cdef cnp.npy_intp[2] shape
        shape[0], shape[1] = x.shape[0], self.n_targets
        cdef size_t n = x.shape[0], width = x.shape[1]
        cdef cnp.ndarray scores = cnp.PyArray_EMPTY(
            2, shape, cnp.NPY_DOUBLE if self.forest.wide_scores else cnp.NPY_FLOAT, 0)
        cdef cnp.ndarray label = None
        cdef int64_t *labels = NULL
        if self.classifier:
            label = cnp.PyArray_EMPTY(1, shape, cnp.NPY_INT64, 0)
            labels = <int64_t *>cnp.PyArray_DATA(label)
        cdef const void *source = cnp.PyArray_DATA(x)
        cdef void *target = cnp.PyArray_DATA(scores)
        cdef int code
        with nogil:
            code = st_forest_run(forest, self.kernel, source, n, width, alone, labels, target)
        if code != ST_OK:
            raise MemoryError
        return label, scores

    def reach(self, rows, uint8_t[::1] reached, const int64_t[::1] wanted):
        """Set reached[node] to 1 for each node that is a leaf which a row reaches. Takes the rows of `run`.

        reached: uint8 [nodes], by the node numbers that the forest was made of. wanted: int64 [n], a node for each row,
        or -1. Returns whether each row reaches the node that is wanted, uint8 [n]. Raises Internal as `run` does.
        """
        cdef cnp.ndarray x = self._matrix(rows)
        cdef const void *source = cnp.PyArray_DATA(x)
        cdef size_t n = x.shape[0], width = x.shape[1]
        cdef int code
        _check(reached.shape[0] >= self.n_nodes and wanted.shape[0] == x.shape[0], "its arrays differ in length")
        cdef cnp.ndarray met = np.zeros(x.shape[0], np.uint8)
        cdef uint8_t *met_at = <uint8_t *>cnp.PyArray_DATA(met)
        if n:
            with nogil:
                code = st_forest_reach(
                    &self.forest, self.kernel, source, n, width, &reached[0], &wanted[0], met_at)
            if code != ST_OK:
                raise MemoryError
        return met


cdef _check(bint holds, reason):
    if not holds:
        raise ValueError(reason)


cdef struct cursor:
    const uint8_t *at
    const uint8_t *end


cdef int _varint(cursor *c, uint64_t *value) noexcept nogil:
    """Read a varint. Returns 0, or -1 if the buffer ends too early or the number is too long."""
    cdef int shift = 0
    cdef uint8_t byte
    value[0] = 0
    while c.at < c.end and shift < 64:
        byte = c.at[0]
        c.at += 1
        value[0] |= <uint64_t>(byte & 0x7f) << shift
        if byte < 0x80:
            return 0
        shift += 7
    return -1


cdef int _field(cursor *c, uint64_t *number, cursor *body, uint64_t *value) noexcept nogil:
    """Read the next field: its number, and its value (varint) or body (others). Returns its wire type; -1: damaged."""
    cdef uint64_t tag, size
    if _varint(c, &tag) < 0:
        return -1
    number[0] = tag >> 3
    cdef int wire = tag & 7
    if wire == 0:
        return 0 if _varint(c, value) == 0 else -1
    if wire == 2:
        if _varint(c, &size) < 0:
            return -1
    elif wire == 1:
        size = 8
    elif wire == 5:
        size = 4
    else:
        return -1
    if size > <uint64_t>(c.end - c.at):
        return -1
    body.at = c.at
    body.end = c.at + size
    c.at += size
    return wire


cdef struct found:
    Py_ssize_t floats, ints, strings
    uint64_t kind
    bint has_f, has_i, has_s, has_t, has_other
    float f
    int64_t i


cdef int _scan(cursor c, found *out, cursor *name, cursor *text, cursor *tensor,
               float *floats, int64_t *ints, cursor *strings) noexcept nogil:
    """Read an AttributeProto once. floats, ints and strings are NULL in the first pass, which only counts entries."""
    cdef uint64_t number = 0, value = 0
    cdef cursor body
    cdef int wire
    out.floats = out.ints = out.strings = 0
    while c.at < c.end:
        wire = _field(&c, &number, &body, &value)
        if wire < 0:
            return -1
        if number == 7:  # floats, packed or not
            if wire != 5 and wire != 2:
                return -1
            if floats != NULL:
                memcpy(floats + out.floats, body.at, (body.end - body.at) // 4 * 4)
            out.floats += (body.end - body.at) // 4
        elif number == 8:  # ints
            if wire == 0:
                if ints != NULL:
                    ints[out.ints] = <int64_t>value
                out.ints += 1
            elif wire == 2:
                while body.at < body.end:
                    if _varint(&body, &value) < 0:
                        return -1
                    if ints != NULL:
                        ints[out.ints] = <int64_t>value
                    out.ints += 1
            else:
                return -1
        elif number == 9 and wire == 2:
            if strings != NULL:
                strings[out.strings] = body
            out.strings += 1
        elif number == 1 and wire == 2:
            name[0] = body
        elif number == 2 and wire == 5:
            out.has_f = True
            memcpy(&out.f, body.at, 4)
        elif number == 3 and wire == 0:
            out.has_i = True
            out.i = <int64_t>value
        elif number == 4 and wire == 2:
            out.has_s = True
            text[0] = body
        elif number == 5 and wire == 2:
            out.has_t = True
            tensor[0] = body
        elif number == 20 and wire == 0:
            out.kind = value
        elif number != 13:  # doc_string
            out.has_other = True
    return 0


cdef bytes _bytes(cursor c):
    return PyBytes_FromStringAndSize(<const char *>c.at, c.end - c.at)


cdef _strings(cursor *strings, Py_ssize_t n):
    """Return (distinct values, uint32 [n] index of each string's value): 100,000 nodes have only seven modes."""
    cdef list values = []
    cdef cnp.ndarray codes = np.empty(n, np.uint32)
    cdef uint32_t *code = <uint32_t *>cnp.PyArray_DATA(codes)
    cdef Py_ssize_t i, k, size, known = 0
    cdef cursor[16] recent
    cdef dict numbers = {}
    for i in range(n):
        size = strings[i].end - strings[i].at
        for k in range(known):
            if recent[k].end - recent[k].at == size and memcmp(recent[k].at, strings[i].at, size) == 0:
                code[i] = <uint32_t>k
                break
        else:
            text = _bytes(strings[i])
            k = numbers.setdefault(text, len(values))
            if k == len(values):
                values.append(text)
            if k < 16 and k == known:
                recent[known] = strings[i]
                known += 1
            code[i] = <uint32_t>k
    return values, codes


def read_attribute(const uint8_t[::1] data):
    """Decode one AttributeProto. Return (name, value).

    value: float, int, bytes, float32 or int64 array, ("tensor", its bytes), ("strings", distinct values, uint32 index
    of each string's value), or None for kinds that no ensemble has. Raises ValueError for a damaged buffer.
    """
    cdef cursor c, name, text, tensor
    cdef found out
    if data.shape[0] == 0:
        raise ValueError("an attribute is empty")
    c.at = &data[0]
    c.end = c.at + data.shape[0]
    name.at = name.end = text.at = text.end = tensor.at = tensor.end = c.at
    out.kind = out.i = 0
    out.f = 0
    out.has_f = out.has_i = out.has_s = out.has_t = out.has_other = False
    if _scan(c, &out, &name, &text, &tensor, NULL, NULL, NULL) < 0:
        raise ValueError("an attribute is damaged")
    cdef cnp.ndarray floats = np.empty(out.floats, np.float32), ints = np.empty(out.ints, np.int64)
    cdef cursor *strings = <cursor *>calloc(out.strings + 1, sizeof(cursor))
    if strings is NULL:
        raise MemoryError
    try:
        _scan(c, &out, &name, &text, &tensor,
              <float *>cnp.PyArray_DATA(floats), <int64_t *>cnp.PyArray_DATA(ints), strings)
        label = _bytes(name).decode("utf-8", "replace")
        if out.has_other:
            return label, None
        if out.kind == 1 or (out.kind == 0 and out.has_f):
            return label, out.f
        if out.kind == 2 or (out.kind == 0 and out.has_i):
            return label, out.i if out.has_i else 0
        if out.kind == 3 or (out.kind == 0 and out.has_s):
            return label, _bytes(text)
        if out.kind == 4 or (out.kind == 0 and out.has_t):
            return label, ("tensor", _bytes(tensor))
        if out.kind == 6 or (out.kind == 0 and out.floats):
            return label, floats
        if out.kind == 7 or (out.kind == 0 and out.ints):
            return label, ints
        if out.kind == 8 or (out.kind == 0 and out.strings):
            return label, ("strings", *_strings(strings, out.strings))
        return label, None
    finally:
        free(strings)
