/* The keyed hash of the keys of rows: SipHash-2-4 of 128 bits, by the paper of Aumasson and Bernstein. Who does not know
 * the secret cannot tell which key a hash is of. The hash of a table (row.h) is faster, and keeps no secret. */
#ifndef SHORTTAIL_SECRET_HASH_H
#define SHORTTAIL_SECRET_HASH_H

#include "load.h"

/* Hash n keys of n_keys columns each. secret: 16 bytes. A column is strings if it has offsets, else 8-byte integers.
 * out: 16 bytes a key. */
void st_secret_hashes(const uint8_t *secret, const st_source *columns, size_t n_keys, size_t n, uint8_t *out);

#endif
