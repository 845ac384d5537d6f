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

#include <event2/buffer.h>

int http_take_head(struct evbuffer *in, size_t limit, char **text, size_t *len)
{
    char two[2];

    /* Some clients end a body with a line end that belongs to nothing. */
    while (evbuffer_copyout(in, two, 2) == 2 && !memcmp(two, "\r\n", 2))
        evbuffer_drain(in, 2);
    struct evbuffer_ptr end = evbuffer_search(in, "\r\n\r\n", 4, NULL);
    if (end.pos < 0)
        return evbuffer_get_length(in) > limit ? -E2BIG : 0;
    *len = (size_t)end.pos + 4;
    if (*len > limit)
        return -E2BIG;
    *text = malloc(*len + 1);
    if (!*text)
        return -E2BIG;
    evbuffer_remove(in, *text, *len);
    (*text)[*len] = '\0';
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

/* Letters of a value: anything but controls; a tab is a space. */
static int is_value(const char *s)
{
    for (; *s; s++)
        if (((unsigned char)*s < ' ' && *s != '\t') || *s == 0x7f)
            return 0;
    return 1;
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

enum { CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, DONE };

void http_body_init(struct http_body *b, const struct http_head *h)
{
    *b = (struct http_body){.framing = h->framing, .left = h->length};
}

static uint64_t move(struct evbuffer *in, struct evbuffer *out, uint64_t n)
{
    size_t have = evbuffer_get_length(in);

    if (n > have)
        n = have;
    evbuffer_remove_buffer(in, out, (size_t)n);
    return n;
}

/* "1a" or "1A;what=ever": up to 15 digits. */
static int parse_chunk_size(const char *line, uint64_t *size)
{
    size_t n = strspn(line, "0123456789abcdefABCDEF");

    if (!n || n > 15 || (line[n] && !strchr("; \t", line[n])) || !is_value(line))
        return -EPROTO;
    *size = strtoull(line, NULL, 16);
    return 0;
}

/* One line of the chunks' framing: 1 taken, 0 not there yet, -EPROTO. */
static int take_line(struct http_body *b, struct evbuffer *in)
{
    size_t len;
    int bad = 0;
    char *line = evbuffer_readln(in, &len, EVBUFFER_EOL_CRLF_STRICT);

    if (!line)
        return evbuffer_get_length(in) > HTTP_MAX_LINE ? -EPROTO : 0;
    if (strlen(line) != len || len > HTTP_MAX_LINE) {
        bad = 1;
    } else if (b->stage == CHUNK_SIZE) {
        bad = parse_chunk_size(line, &b->left) < 0;
        b->stage = b->left ? CHUNK_DATA : TRAILER;
    } else if (b->stage == CHUNK_END) {
        bad = len != 0;
        b->stage = CHUNK_SIZE;
    } else { /* a field of the trailer, which is not passed on */
        b->trailer += (unsigned)len;
        bad = b->trailer > HTTP_MAX_TRAILER;
        b->stage = len ? TRAILER : DONE;
    }
    free(line);
    return bad ? -EPROTO : 1;
}

static int take_chunks(struct http_body *b, struct evbuffer *in, struct evbuffer *out)
{
    while (b->stage != DONE) {
        if (b->stage == CHUNK_DATA) {
            b->left -= move(in, out, b->left);
            if (b->left)
                return 0;
            b->stage = CHUNK_END;
        }
        int rc = take_line(b, in);
        if (rc <= 0)
            return rc;
    }
    return 1;
}

int http_body_take(struct http_body *b, struct evbuffer *in, struct evbuffer *out)
{
    switch (b->framing) {
    case HTTP_EMPTY: return 1;
    case HTTP_LENGTH: b->left -= move(in, out, b->left); return b->left == 0;
    case HTTP_TO_END: move(in, out, UINT64_MAX); return 0;
    case HTTP_CHUNKED: return take_chunks(b, in, out);
    }
    return -EPROTO;
}
