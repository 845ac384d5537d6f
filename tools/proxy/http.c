/* SPDX-License-Identifier: Apache-2.0 */
/*
 * HTTP/1.1 as it is on the wire.  Functions of their arguments alone; tests/fuzz/fuzz_http.c.
 *
 * Why not evhttp of libevent 2.1: between a request and its answer it does not read, so a client
 * that leaves during the prefill hop is not noticed, and it ends the process on states it does not
 * expect.
 */
#include "proxy/http.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

int http_take_head(struct bytes *in, size_t limit, char **text, size_t *len)
{
    /* Some clients end a body with a line end that belongs to nothing. */
    while (in->len >= 2 && !memcmp(in->at, "\r\n", 2))
        bytes_take(in, 2);
    char *end = memmem(in->at, in->len, "\r\n\r\n", 4);
    if (!end)
        return in->len > limit ? -E2BIG : 0;
    *len = (size_t)(end - in->at) + 4;
    *text = *len > limit ? NULL : strndup(in->at, *len);
    if (!*text)
        return -E2BIG;
    bytes_take(in, *len);
    return 1;
}

static int is_token(const char *s)
{
    if (!*s)
        return 0;
    for (; *s; s++)
        if (!isalnum((unsigned char)*s) && !strchr("!#$%&'*+-.^_`|~", *s))
            return 0;
    return 1;
}

/* Anything but controls; a tab is a space. */
static int is_text(char c)
{
    return c == '\t' || ((unsigned char)c >= ' ' && c != 0x7f);
}

static int is_value(const char *s)
{
    while (is_text(*s))
        s++;
    return !*s;
}

/* The next line, ended in place; NULL when it does not end in CR LF. */
static char *next_line(char **at)
{
    char *line = *at, *end = strchr(line, '\n');

    if (!end || end == line || end[-1] != '\r')
        return NULL;
    end[-1] = '\0';
    *at = end + 1;
    return line;
}

static int parse_fields(struct http_head *h, char *at)
{
    for (;;) {
        char *line = next_line(&at);
        if (!line)
            return 400;
        if (!*line)
            return 0;
        char *value = strchr(line, ':');
        if (!value)
            return 400;
        *value++ = '\0';
        value += strspn(value, " \t");
        for (size_t n = strlen(value); n && strchr(" \t", value[n - 1]);)
            value[--n] = '\0';
        if (!is_token(line) || !is_value(value))
            return 400;
        if (h->nfields == HTTP_MAX_FIELDS)
            return 431;
        h->fields[h->nfields++] = (struct http_field){line, value};
    }
}

const char *http_field(const struct http_head *h, const char *name)
{
    for (unsigned i = 0; i < h->nfields; i++)
        if (!strcasecmp(h->fields[i].name, name))
            return h->fields[i].value;
    return NULL;
}

/* Is the word in a list of words parted by commas? */
static int lists(const char *list, const char *word)
{
    size_t len = strlen(word);

    while (list && *list) {
        list += strspn(list, ", \t");
        size_t n = strcspn(list, ", \t");
        if (n == len && !strncasecmp(list, word, len))
            return 1;
        list += n;
    }
    return 0;
}

int http_is_hop_by_hop(const struct http_head *h, const char *name)
{
    static const char words[] = "connection,keep-alive,proxy-connection,proxy-authenticate,"
                                "proxy-authorization,te,trailer,transfer-encoding,upgrade,"
                                "content-length,expect";
    return lists(words, name) || lists(http_field(h, "connection"), name);
}

static int parse_length(const char *s, uint64_t *length)
{
    size_t n = strspn(s, "0123456789");

    if (!n || n > 18 || s[n])
        return -EPROTO;
    *length = strtoull(s, NULL, 10);
    return 0;
}

/* How the body ends, by its fields alone; HTTP_TO_END when they do not say.  Two fields that say it
 * are refused even when they agree. */
static int parse_framing(struct http_head *h)
{
    unsigned lengths = 0, encodings = 0;

    h->framing = HTTP_TO_END;
    for (unsigned i = 0; i < h->nfields; i++) {
        const struct http_field *f = &h->fields[i];
        if (!strcasecmp(f->name, "content-length")) {
            h->framing = HTTP_LENGTH;
            lengths++;
            if (parse_length(f->value, &h->length) < 0)
                return -EPROTO;
        } else if (!strcasecmp(f->name, "transfer-encoding")) {
            h->framing = HTTP_CHUNKED;
            encodings++;
            if (strcasecmp(f->value, "chunked"))
                return -EPROTO;
        }
    }
    if (lengths + encodings > 1 || (encodings && h->minor == 0))
        return -EPROTO;
    const char *connection = http_field(h, "connection");
    h->keep = h->minor ? !lists(connection, "close") : lists(connection, "keep-alive");
    return 0;
}

/* "HTTP/1.0" or "HTTP/1.1". */
static int parse_version(const char *s)
{
    if (strncmp(s, "HTTP/1.", 7) || (s[7] != '0' && s[7] != '1') || s[8])
        return -EPROTO;
    return s[7] - '0';
}

int http_parse_request(struct http_head *h, char *text, size_t len)
{
    char *at = text, *space, *version;

    memset(h, 0, sizeof *h);
    h->text = text;
    if (strlen(text) != len)
        return 400;
    char *line = next_line(&at);
    if (!line || !(space = strchr(line, ' ')) || !(version = strchr(space + 1, ' ')))
        return 400;
    *space = *version++ = '\0';
    h->method = line;
    h->target = space + 1;
    if (!is_token(line) || *h->target != '/') /* no forward proxy */
        return 400;
    for (const char *p = h->target; *p; p++)
        if ((unsigned char)(*p - '!') > '~' - '!')
            return 400;
    h->minor = parse_version(version);
    if (h->minor < 0)
        return !strncmp(version, "HTTP/", 5) ? 505 : 400;
    int status = parse_fields(h, at);
    if (status)
        return status;
    if (parse_framing(h) < 0)
        return 400;
    if (h->framing == HTTP_TO_END)
        h->framing = HTTP_EMPTY;
    return 0;
}

int http_parse_response(struct http_head *h, char *text, size_t len, int answers_head)
{
    char *at = text;

    memset(h, 0, sizeof *h);
    h->text = text;
    char *line = strlen(text) == len ? next_line(&at) : NULL;
    if (!line || strlen(line) < 12 || line[8] != ' ' || (line[12] && line[12] != ' ') ||
        !is_value(line))
        return -EPROTO;
    line[8] = '\0';
    h->minor = parse_version(line);
    for (int i = 9; i < 12; i++) {
        if (!isdigit((unsigned char)line[i]))
            return -EPROTO;
        h->status = h->status * 10 + line[i] - '0';
    }
    if (h->minor < 0 || h->status < 100 || h->status > 599 || parse_fields(h, at) ||
        parse_framing(h) < 0)
        return -EPROTO;
    if (answers_head || h->status < 200 || h->status == 204 || h->status == 304)
        h->framing = HTTP_EMPTY;
    if (h->framing == HTTP_TO_END)
        h->keep = 0;
    return 0;
}

void http_head_free(struct http_head *h)
{
    free(h->text);
    memset(h, 0, sizeof *h);
}

const char *http_reason(int status)
{
    static const struct {
        int status;
        const char *text;
    } reasons[] = {
        {200, "OK"},
        {400, "Bad Request"},
        {403, "Forbidden"},
        {404, "Not Found"},
        {405, "Method Not Allowed"},
        {408, "Request Timeout"},
        {413, "Content Too Large"},
        {431, "Request Header Fields Too Large"},
        {502, "Bad Gateway"},
        {503, "Service Unavailable"},
        {504, "Gateway Timeout"},
        {505, "HTTP Version Not Supported"},
    };
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
        if (reasons[i].status == status)
            return reasons[i].text;
    return "Status";
}

/* ---- bodies ---- */

/* What the next byte is of: the body, or the chunks' framing, where _LF is the end of a line. */
enum { DATA, DATA_CR, DATA_LF, SIZE, EXTENSION, SIZE_LF, TRAILER, FIELD, FIELD_LF, END_LF, DONE };

void http_body_init(struct http_body *b, const struct http_head *h)
{
    *b = (struct http_body){.framing = h->framing, .stage = DATA};
    switch (h->framing) {
    case HTTP_EMPTY: b->stage = DONE; break;
    case HTTP_LENGTH: b->stage = (b->left = h->length) ? DATA : DONE; break;
    case HTTP_CHUNKED: b->stage = SIZE; break;
    case HTTP_TO_END: b->left = UINT64_MAX; break;
    }
}

/* "1a" or "1A;what=ever", up to 15 digits. */
static int size_byte(struct http_body *b, char c)
{
    if (b->stage == SIZE && isxdigit((unsigned char)c)) {
        b->left = b->left << 4 | (uint64_t)(c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
        return b->line <= 15 ? SIZE : -EPROTO;
    }
    if (b->stage == SIZE && (b->line == 1 || !strchr("\r; \t", c)))
        return -EPROTO;
    if (c == '\r')
        return SIZE_LF;
    return is_text(c) && b->line <= HTTP_MAX_LINE ? EXTENSION : -EPROTO;
}

/* What the byte after this one of the framing is of, or -EPROTO. */
static int framing_byte(struct http_body *b, char c)
{
    b->line++;
    switch (b->stage) {
    case DATA_CR: return c == '\r' ? DATA_LF : -EPROTO;
    case DATA_LF: b->line = 0; return c == '\n' ? SIZE : -EPROTO;
    case SIZE:
    case EXTENSION: return size_byte(b, c);
    case SIZE_LF: b->line = 0; return c != '\n' ? -EPROTO : b->left ? DATA : TRAILER;
    case TRAILER: /* not passed on */
    case FIELD:
        if (c == '\r')
            return b->stage == TRAILER ? END_LF : FIELD_LF;
        return is_text(c) && b->line <= HTTP_MAX_TRAILER ? FIELD : -EPROTO;
    case FIELD_LF: return c == '\n' ? TRAILER : -EPROTO;
    case END_LF: return c == '\n' ? DONE : -EPROTO;
    }
    return -EPROTO;
}

int http_body_take(struct http_body *b, struct bytes *in, http_take *take, void *arg)
{
    char *body = in->at;
    size_t len = 0;

    while (in->len && b->stage >= 0 && b->stage != DONE) {
        size_t n = 1;
        if (b->stage == DATA) {
            n = in->len < b->left ? in->len : (size_t)b->left;
            memmove(body + len, in->at, n);
            len += n;
            b->left -= n;
            if (!b->left)
                b->stage = b->framing == HTTP_CHUNKED ? DATA_CR : DONE;
        } else {
            b->stage = framing_byte(b, *in->at);
        }
        bytes_take(in, n);
    }
    if (len)
        take(arg, body, len);
    return b->stage < 0 ? b->stage : b->stage == DONE;
}

size_t http_put_size(char line[HTTP_SIZE_LINE], size_t len)
{
    size_t digits = 1, left = len;

    while (left >>= 4)
        digits++;
    for (size_t i = digits; i--; len >>= 4)
        line[i] = "0123456789abcdef"[len & 15];
    memcpy(line + digits, "\r\n", 2);
    return digits + 2;
}
