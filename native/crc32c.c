/* See crc32c.h. The CRC instruction has a latency of three cycles but can start every cycle, so three stretches of the
 * data are processed at once and their checksums are combined. CRC is linear, and appending a fixed number of zeros to
 * a stretch is a linear map of 32 bits, which is stored as four tables of 256 entries. Source: Adler's crc32c.c; Gopal
 * et al., "Fast CRC Computation for iSCSI Polynomial Using CRC32 Instruction", 2011. */
#include "crc32c.h"

#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

enum { STRETCH_BYTES = 1352 }; /* a multiple of 8; three stretches are a page's 4,076 checksummed bytes less 20 */

static uint32_t step_portable(uint32_t crc, uint8_t byte)
{
    /* The reflected Castagnoli polynomial, four bits at a time. */
    static const uint32_t table[16] = {
        0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3, 0x61c69362, 0x7198540d,
        0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9, 0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75,
    };
    crc ^= byte;
    crc = (crc >> 4) ^ table[crc & 15];
    return (crc >> 4) ^ table[crc & 15];
}

static uint32_t crc_portable(uint32_t crc, const uint8_t *data, size_t n)
{
    while (n--) crc = step_portable(crc, *data++);
    return crc;
}

#if defined(__x86_64__)
#define TARGET __attribute__((target("sse4.2")))
#define STEP_8(crc, word) ((uint32_t)_mm_crc32_u64(crc, word))
#define STEP_1(crc, byte) _mm_crc32_u8(crc, byte)
static int has_instruction(void) { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__) && defined(__linux__)
#define TARGET __attribute__((target("+crc")))
#define STEP_8(crc, word) __crc32cd(crc, word)
#define STEP_1(crc, byte) __crc32cb(crc, byte)
static int has_instruction(void) { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }
#endif

#ifdef TARGET
/* For each value of each checksum byte: the checksum after appending STRETCH_BYTES, or twice that many, zeros. */
static uint32_t one_stretch[4][256], two_stretches[4][256];

static uint64_t load64(const uint8_t *data)
{
    uint64_t word;
    memcpy(&word, data, sizeof word);
    return word;
}

static uint32_t append(const uint32_t table[4][256], uint32_t crc)
{
    return table[0][crc & 255] ^ table[1][crc >> 8 & 255] ^ table[2][crc >> 16 & 255] ^ table[3][crc >> 24];
}

/* Runs when the library is loaded, before any thread can use the tables. */
__attribute__((constructor)) static void make_tables(void)
{
    static const uint8_t zeros[STRETCH_BYTES];
    for (uint32_t k = 0; k < 4; k++) {
        for (uint32_t bit = 0; bit < 8; bit++) {
            uint32_t image = crc_portable((uint32_t)1 << (8 * k + bit), zeros, STRETCH_BYTES);
            for (uint32_t low = 0; low < 1u << bit; low++)
                one_stretch[k][1u << bit | low] = one_stretch[k][low] ^ image;
        }
    }
    for (uint32_t k = 0; k < 4; k++)
        for (uint32_t byte = 0; byte < 256; byte++)
            two_stretches[k][byte] = append(one_stretch, one_stretch[k][byte]);
}

TARGET static uint32_t crc_native(uint32_t crc, const uint8_t *data, size_t n)
{
    for (; n >= 3 * STRETCH_BYTES; data += 3 * STRETCH_BYTES, n -= 3 * STRETCH_BYTES) {
        uint32_t second = 0, third = 0;
        for (size_t i = 0; i < STRETCH_BYTES; i += 8) {
            crc = STEP_8(crc, load64(data + i));
            second = STEP_8(second, load64(data + STRETCH_BYTES + i));
            third = STEP_8(third, load64(data + 2 * STRETCH_BYTES + i));
        }
        crc = append(two_stretches, crc) ^ append(one_stretch, second) ^ third;
    }
    for (; n >= 8; data += 8, n -= 8) crc = STEP_8(crc, load64(data));
    while (n--) crc = STEP_1(crc, *data++);
    return crc;
}
#endif

uint32_t st_crc32c(const uint8_t *data, size_t n)
{
#ifdef TARGET
    if (has_instruction()) return ~crc_native(UINT32_MAX, data, n);
#endif
    return ~crc_portable(UINT32_MAX, data, n);
}
