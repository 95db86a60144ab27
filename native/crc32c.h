/* CRC-32C (Castagnoli), the checksum that iSCSI, ext4 and RocksDB use. */
#ifndef SHORTTAIL_CRC32C_H
#define SHORTTAIL_CRC32C_H

#include <stddef.h>
#include <stdint.h>

uint32_t st_crc32c(const uint8_t *data, size_t n);

#endif
