/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as what a client or an engine sends.  However they are cut into pieces they are
 * understood in the same way; and a head that was taken means the same when it is written out
 * again.
 */
#include "proxy/http.h"

#include <stdlib.h>
#include <string.h>

#include <event2/buffer.h>

#define MUST(x) ((x) ? (void)0 : abort())

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What became of the bytes. */
struct outcome {
    int status;             /* of the head, or -1: it did not end, or was too long */
    int body;               /* as http_body_take says */
    struct evbuffer *bytes; /* of the body */
};

static void same_head(const struct http_head *h, int is_request)
{
    struct evbuffer *out = evbuffer_new();
    struct http_head again;

    if (is_request)
        evbuffer_add_printf(out, "%s %s HTTP/1.%d\r\n", h->method, h->target, h->minor);
    else
        evbuffer_add_printf(out, "HTTP/1.%d %d\r\n", h->minor, h->status);
    for (unsigned i = 0; i < h->nfields; i++)
        evbuffer_add_printf(out, "%s:%s\r\n", h->fields[i].name, h->fields[i].value);
    evbuffer_add(out, "\r\n", 2);
    size_t len = evbuffer_get_length(out);
    char *text = malloc(len + 1);
    MUST(text);
    evbuffer_remove(out, text, len);
    text[len] = '\0';
    MUST((is_request ? http_parse_request(&again, text, len)
                     : http_parse_response(&again, text, len, 0)) == 0);
    MUST(again.nfields == h->nfields && again.framing == h->framing && again.length == h->length &&
         again.keep == h->keep);
    for (unsigned i = 0; i < h->nfields; i++)
        MUST(!strcmp(again.fields[i].name, h->fields[i].name) &&
             !strcmp(again.fields[i].value, h->fields[i].value));
    http_head_free(&again);
    evbuffer_free(out);
}

static void keep(void *arg, const char *data, size_t len)
{
    evbuffer_add(arg, data, len);
}

static struct outcome understand(const uint8_t *data, size_t size, size_t piece, int is_request)
{
    struct outcome o = {.status = -1, .bytes = evbuffer_new()};
    char *copy = malloc(size + 1);
    struct bytes in = {copy, 0};
    struct http_head head;
    struct http_body body;
    int has_head = 0;

    for (size_t at = 0; at < size && o.body == 0; at += piece) {
        char *text;
        size_t len, n = piece < size - at ? piece : size - at;
        memcpy(copy + at, data + at, n);
        in.len += n;
        if (!has_head) {
            int rc = http_take_head(&in, 2048, &text, &len);
            if (rc == 0)
                continue;
            if (rc < 0)
                break;
            o.status = is_request ? http_parse_request(&head, text, len)
                                  : http_parse_response(&head, text, len, 0);
            if (o.status == 0)
                same_head(&head, is_request);
            http_body_init(&body, &head);
            http_head_free(&head);
            if (o.status)
                break;
            has_head = 1;
        }
        o.body = http_body_take(&body, &in, keep, o.bytes);
    }
    free(copy);
    return o;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int is_request = size && data[0] != 'H';
    struct outcome whole = understand(data, size, size ? size : 1, is_request);
    struct outcome pieces = understand(data, size, 1, is_request);
    size_t n = evbuffer_get_length(whole.bytes);

    /* Too long is seen when it has come: in pieces, before what would have ended it. */
    MUST(size > 1024 || (whole.status == pieces.status && whole.body == pieces.body));
    if (whole.body > 0 && pieces.body > 0) {
        MUST(evbuffer_get_length(pieces.bytes) == n);
        MUST(!n || !memcmp(evbuffer_pullup(whole.bytes, -1), evbuffer_pullup(pieces.bytes, -1), n));
    }
    evbuffer_free(whole.bytes);
    evbuffer_free(pieces.bytes);
    return 0;
}
