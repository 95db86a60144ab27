/* Parses the parts of HTTP/1.1 that a keep-alive client needs: status, Content-Length, chunked, Connection: close. */
#include <strings.h>

#include "loadtest.h"

enum { HEAD, BODY, CHUNK_SIZE, CHUNK, TRAILER, UNTIL_CLOSE };
enum { LINE_MAX_BYTES = 64 << 10 };

void lt_http_start(struct lt_http *h) { *h = (struct lt_http){.phase = HEAD}; }

/* Returns the end of the line at h->position, after its LF; 0 if the LF has not arrived. */
static uint64_t line_end(const struct lt_http *h, const uint8_t *data, uint64_t size)
{
    const uint8_t *lf = memchr(data + h->position, '\n', size - h->position);
    return lf ? (uint64_t)(lf - data) + 1 : 0;
}

static int has_name(const uint8_t *line, uint64_t length, const char *name)
{
    size_t n = strlen(name);
    return length > n && line[n] == ':' && strncasecmp((const char *)line, name, n) == 0;
}

/* Returns whether a field contains a word, in upper or lower case. */
static int has_word(const uint8_t *line, uint64_t length, const char *word)
{
    size_t n = strlen(word);
    for (uint64_t i = 0; i + n <= length; i++)
        if (strncasecmp((const char *)line + i, word, n) == 0)
            return 1;
    return 0;
}

static int read_length(const uint8_t *p, const uint8_t *end, uint64_t base, uint64_t *value)
{
    int n = 0;
    *value = 0;
    while (p < end && (*p == ' ' || *p == '\t'))
        p++;
    for (; p < end && n < 15; p++, n++) {
        int c = *p | 32, digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : 99;
        if ((uint64_t)digit >= base)
            break;
        *value = *value * base + (uint64_t)digit;
    }
    return n > 0 && n < 15;
}

static enum lt_http_result read_field(struct lt_http *h, const uint8_t *line, uint64_t length, uint64_t *body)
{
    if (has_name(line, length, "content-length")) {
        if (!read_length(line + 15, line + length, 10, body))
            return LT_HTTP_INVALID;
        h->framing = 1;
    } else if (has_name(line, length, "transfer-encoding") && has_word(line + 18, length - 18, "chunked")) {
        h->framing = 2;
    } else if (has_name(line, length, "connection") && has_word(line + 11, length - 11, "close")) {
        h->close = 1;
    }
    return LT_HTTP_WHOLE;
}

static enum lt_http_result read_head(struct lt_http *h, const uint8_t *data, uint64_t size)
{
    for (;;) {
        uint64_t end = line_end(h, data, size), start = h->position;
        if (end == 0)
            return size - start > LINE_MAX_BYTES ? LT_HTTP_INVALID : LT_HTTP_MORE;
        uint64_t length = end - start - 1 - (end - start >= 2 && data[end - 2] == '\r');
        const uint8_t *line = data + start;
        h->position = end;
        if (h->status == 0) {
            if (length < 12 || memcmp(line, "HTTP/1.", 7) != 0 || line[9] < '1' || line[9] > '5')
                return LT_HTTP_INVALID;
            h->status = (line[9] - '0') * 100 + (line[10] - '0') * 10 + (line[11] - '0');
            h->close = line[7] == '0';
        } else if (length > 0) {
            if (read_field(h, line, length, &h->body_end) == LT_HTTP_INVALID)
                return LT_HTTP_INVALID;
        } else if (h->status < 200) { /* 100 Continue: the final answer follows */
            uint64_t position = h->position;
            lt_http_start(h);
            h->position = position;
        } else {
            int empty = h->status == 204 || h->status == 304;
            if (!empty && h->framing == 0)
                h->close = 1;
            h->phase = empty || h->framing == 1 ? BODY : h->framing == 2 ? CHUNK_SIZE : UNTIL_CLOSE;
            h->body_begin = h->position;
            h->body_end = h->position + (empty ? 0 : h->body_end);
            return LT_HTTP_WHOLE;
        }
    }
}

/* A chunk is a line with its size in hexadecimal, that many bytes, and CR LF. The last has size 0; trailers follow. */
static enum lt_http_result read_chunks(struct lt_http *h, const uint8_t *data, uint64_t size)
{
    for (;;) {
        uint64_t end, length;
        if (h->phase == CHUNK) {
            if (size < h->body_end)
                return LT_HTTP_MORE;
            h->position = h->body_end;
            h->phase = CHUNK_SIZE;
        }
        end = line_end(h, data, size);
        if (end == 0)
            return size - h->position > LINE_MAX_BYTES ? LT_HTTP_INVALID : LT_HTTP_MORE;
        if (h->phase == TRAILER) {
            int is_last = end - h->position <= 2;
            h->position = end;
            if (is_last)
                return LT_HTTP_WHOLE;
            continue;
        }
        if (!read_length(data + h->position, data + end, 16, &length))
            return LT_HTTP_INVALID;
        h->position = end;
        h->body_end = end + length + 2;
        h->phase = length ? CHUNK : TRAILER;
    }
}

uint64_t lt_http_join(const struct lt_http *h, uint8_t *data)
{
    uint64_t from = h->body_begin, to = h->body_begin, length;
    if (h->framing != 2)
        return h->position;
    for (;;) {
        uint64_t start = (uint64_t)((const uint8_t *)memchr(data + from, '\n', h->position - from) - data) + 1;
        if (!read_length(data + from, data + start, 16, &length) || length == 0)
            return to;
        memmove(data + to, data + start, length);
        to += length;
        from = start + length + 2;
    }
}

enum lt_http_result lt_http_read(struct lt_http *h, const uint8_t *data, uint64_t size, int at_end)
{
    if (h->phase == HEAD) {
        enum lt_http_result result = read_head(h, data, size);
        if (result != LT_HTTP_WHOLE)
            return result;
    }
    if (h->phase == UNTIL_CLOSE) {
        h->position = size;
        return at_end ? LT_HTTP_WHOLE : LT_HTTP_MORE;
    }
    if (h->phase != BODY)
        return read_chunks(h, data, size);
    if (size < h->body_end)
        return LT_HTTP_MORE;
    h->position = h->body_end;
    return LT_HTTP_WHOLE;
}
