/* SPDX-License-Identifier: Apache-2.0 */
/*
 * http.h - heads and bodies of HTTP/1.1, read strictly: what two readers could understand in two
 * ways is refused (bare line feeds, folded fields, two lengths, a length beside chunks).
 */
#ifndef PROXY_HTTP_H
#define PROXY_HTTP_H

#include <stddef.h>
#include <stdint.h>

#include "proxy/bytes.h"

enum { HTTP_MAX_FIELDS = 100, HTTP_MAX_LINE = 1024, HTTP_MAX_TRAILER = 8192, HTTP_SIZE_LINE = 18 };

enum http_framing {
    HTTP_EMPTY,   /* there is no body */
    HTTP_LENGTH,  /* Content-Length */
    HTTP_CHUNKED, /* Transfer-Encoding: chunked */
    HTTP_TO_END   /* what comes until the connection ends; responses only */
};
struct http_field {
    const char *name, *value;
};
struct http_head {
    char *text;                  /* what the rest points into; http_head_free */
    const char *method, *target; /* of a request */
    int status;                  /* of a response */
    int minor;                   /* HTTP/1.minor */
    int keep;                    /* the connection may be used again */
    enum http_framing framing;   /* of the body that follows */
    uint64_t length;             /* of HTTP_LENGTH */
    unsigned nfields;
    struct http_field fields[HTTP_MAX_FIELDS];
};

/* Takes a head, up to its empty line, out of `in`: 1, and a text to be freed, or 0 (not all there
 * yet), or -E2BIG. */
int http_take_head(struct bytes *in, size_t limit, char **text, size_t *len);
/* Parse a text, which is theirs from then on.  0, or the status a client deserves. */
int http_parse_request(struct http_head *h, char *text, size_t len);
/* 0 or -EPROTO.  What answers HEAD has no body. */
int http_parse_response(struct http_head *h, char *text, size_t len, int answers_head);
void http_head_free(struct http_head *h);
/* The value of the first field of that name, or NULL. */
const char *http_field(const struct http_head *h, const char *name);
/* Is it of one connection only, so that it is not passed on? */
int http_is_hop_by_hop(const struct http_head *h, const char *name);
const char *http_reason(int status);

struct http_body {
    enum http_framing framing;
    uint64_t left; /* of the length, or of the chunk */
    int stage;
    unsigned line; /* bytes of the line, or of the trailer, so far */
};
/* The line before a chunk; its length.  (printf would be a third of what a chunk costs.) */
size_t http_put_size(char line[HTTP_SIZE_LINE], size_t len);
typedef void http_take(void *arg, const char *data, size_t len);
void http_body_init(struct http_body *b, const struct http_head *h);
/* Takes what of the body is in `in`, moves it together there and gives it to `take`: 1 complete, 0
 * there is more to come, -EPROTO. */
int http_body_take(struct http_body *b, struct bytes *in, http_take *take, void *arg);

#endif
