/* Checks pages of LMDB's trees in full, before LMDB itself follows them: LMDB trusts most of what it reads.
 *
 * The checks hold for a commit whose pages are not reused meanwhile: one with an open read transaction, or the newest.
 */
#ifndef SHORTTAIL_STRUCTURE_H
#define SHORTTAIL_STRUCTURE_H

#include "tree.h"

/* Check the pages from the root to the leaf in which a key is, or would be. Returns NULL, or what is wrong with page
 * *number. */
const char *st_structure_path(const st_tree *tree, const uint8_t *key, uint32_t key_bytes, uint64_t *number);

/* Check all pages of both trees, and that each page of the file is used once: by a tree, by a value, or in the list of
 * free pages. Values' pages are counted, but not read. values: their headers are read too. *spare: whether values may
 * have more pages than they need. Returns NULL, or what is wrong with the page *number (0: with the file); "": no
 * memory. */
const char *st_structure_check(const st_tree *tree, int values, int *spare, uint64_t *number);

/* Whether LMDB may free the pages of a value: it trusts the header in front of the value. A value that was written in
 * the same transaction is not in the map and may be freed. key_bytes: the length of its key. */
int st_structure_may_free(const st_map *map, const uint8_t *value, uint64_t bytes, uint32_t key_bytes);

#endif
