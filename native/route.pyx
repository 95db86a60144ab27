"""Routes: what changes while a plan is in use. A plan never changes; a route holds the plan and what is reused with it.

The embedded engine keeps one Route for each plan. The server's routes (native/wire) are Routes that also hold the open
batch of requests. Both ask the same Split which requests a canary answers.
"""

from shorttail._native.columns cimport Columns


cdef class Split:
    """Split(version, percent, salt, n_columns): the share of requests that a canary version answers.

    A request belongs to the share if a hash of its first row's first `n_columns` columns falls below `percent` of all
    hashes. So the same keys always get the same version. salt: 32 bits that give each canary its own share of the keys.
    """

    def __cinit__(self, int64_t version, double percent, uint32_t salt, int n_columns):
        self.version = version
        self.below = <uint64_t>(percent / 100 * 4294967296.0 + 0.5)
        self.salt = salt
        self.n_columns = n_columns

    cpdef bint takes(self, Columns columns, Py_ssize_t row):
        """Whether the canary answers the request whose first row this is. The row must exist."""
        return columns.hash_values(row, self.n_columns, self.salt) < self.below


cdef class Route:
    """Route(plan): a plan in use, with the directories of its views and the spare batches of columns.

    Threads may share a route: each method does one thing under the GIL.
    """

    def __init__(self, plan):
        self.plan = plan
        self.directories = ()
        self.spare = []

    def directories_in(self, store):
        """The directories of the plan's views, one for each, None where a table is empty.

        Call it between store.enter() and store.leave(): the addresses in a directory belong to that snapshot.
        """
        held = store.directories
        if held is self.directories_of:
            return self.directories
        directories = tuple([store.directory(view) for view in self.plan.view_names])
        # Building a directory replaces nothing in the dict that the store holds; dropping one replaces the dict.
        self.directories = directories
        self.directories_of = store.directories
        return directories

    def take_columns(self):
        """An empty Columns for this plan. Give it back with `give_back`, so that the next call reuses its memory."""
        # pop and append are atomic under the GIL, so threads share the list without a lock.
        try:
            return self.spare.pop()
        except IndexError:
            return self.plan.new_columns()

    def give_back(self, Columns columns not None):
        """Empty these columns and keep them for the next call of `take_columns`."""
        columns.reset()
        self.spare.append(columns)
