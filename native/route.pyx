"""A Route holds a plan, which never changes, and the state that changes while the plan is in use.

The embedded engine has one Route for each plan. The server's WireRoute (native/wire_batch.pxi) is a Route that also
holds the open batch of requests. Both use a Split to decide which requests a canary version answers.
"""

from shorttail._native.columns cimport Columns


cdef class Split:
    """Split(version, percent, salt, n_columns): the requests that a canary version answers.

    The canary answers a request if the 32-bit hash of the first `n_columns` columns of its first row is below `percent`
    percent of 2**32. So the same keys always get the same version. salt: 32 bits that are hashed too, so that each
    canary gets other keys.
    """

    def __cinit__(self, int64_t version, double percent, uint32_t salt, int n_columns):
        self.version = version
        self.below = <uint64_t>(percent / 100 * 4294967296.0 + 0.5)
        self.salt = salt
        self.n_columns = n_columns

    cpdef bint takes(self, Columns columns, Py_ssize_t row):
        """Whether the canary answers the request that begins at `row`, which must exist."""
        return columns.hash_values(row, self.n_columns, self.salt) < self.below


cdef class Route:
    """Route(plan): a plan in use, the directories of its tables, and spare Columns.

    Threads may share a route, because each method changes the route's state in one step under the GIL.
    """

    def __init__(self, plan):
        self.plan = plan
        self.directories = ()
        self.spare = []

    def directories_in(self, store):
        """Return the directories of the plan's tables; None for an empty one.

        Call it between store.enter() and store.leave(), because the addresses in a directory are those of the snapshot.
        """
        held = store.directories
        if held is self.directories_of:
            return self.directories
        directories = tuple([store.table_directory(table) for table in self.plan.table_ids])
        # The store adds directories to this dict, and replaces the dict when it drops one: identity is enough to
        # compare.
        self.directories = directories
        self.directories_of = store.directories
        return directories

    def take_columns(self):
        """Return empty Columns of this plan. `give_back` returns them to the route, so that their memory is reused."""
        # pop and append are atomic under the GIL, so threads share the list without a lock.
        try:
            return self.spare.pop()
        except IndexError:
            return self.plan.new_columns()

    def give_back(self, Columns columns not None):
        """Empty columns, and keep them for the next call of `take_columns`."""
        columns.reset()
        self.spare.append(columns)
