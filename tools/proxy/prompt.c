/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the proxy reads in a body, and what it changes.  A body it does not understand is no error:
 * it goes to a decoder as it is, which says better what is wrong with it.
 */
#include "proxy/proxy.h"

#include <string.h>

enum { BYTES_PER_TOKEN = 4, KEY_BLOCKS = 4, USUAL_OUTPUT = 256 };

/* What is read of a prompt: the first of it goes into the key. */
struct reading {
    struct prompt *p;
    uint64_t block_tokens;
    size_t room; /* bytes that may still go into the key */
};

static void read_key(struct reading *r, const void *data, size_t len)
{
    if (len > r->room)
        len = r->room;
    r->p->key = balance_hash(r->p->key, data, len);
    r->room -= len;
}

static void read_text(struct reading *r, const json_t *text)
{
    r->p->tokens += (json_string_length(text) + BYTES_PER_TOKEN - 1) / BYTES_PER_TOKEN;
    read_key(r, json_string_value(text), json_string_length(text));
}

/* "text", [1, 2, 3], ["text", ...] or [[1, 2], ...]: nested once at most, by the API. */
static void read_prompt(struct reading *r, const json_t *v, int nested)
{
    size_t i;
    json_t *e;

    if (json_is_string(v))
        read_text(r, v);
    json_array_foreach(v, i, e)
    {
        json_int_t id = json_integer_value(e);
        if (json_is_integer(e)) {
            r->p->tokens++;
            read_key(r, &id, BYTES_PER_TOKEN);
        } else if (!nested) {
            read_prompt(r, e, 1);
        }
    }
}

static void read_part(struct reading *r, const json_t *part)
{
    json_t *text = json_object_get(part, "text");

    if (json_is_string(text))
        read_text(r, text);
    else
        r->p->tokens += r->block_tokens; /* an image or the like is not short */
}

static void read_messages(struct reading *r, const json_t *messages)
{
    size_t i, j;
    json_t *message, *part;

    json_array_foreach(messages, i, message)
    {
        json_t *role = json_object_get(message, "role"),
               *content = json_object_get(message, "content");
        if (json_is_string(role))
            read_text(r, role);
        if (json_is_string(content))
            read_text(r, content);
        json_array_foreach(content, j, part) read_part(r, part);
    }
}

static uint64_t positive(const json_t *o, const char *name, uint64_t usual)
{
    json_int_t n = json_integer_value(json_object_get(o, name));
    return n > 0 && n < 1 << 30 ? (uint64_t)n : usual;
}

int prompt_read(struct prompt *p, const char *target, struct evbuffer *body, uint64_t block_tokens)
{
    static const char *const targets[] = {"/v1/completions", "/v1/chat/completions"};
    static const char *const apart[] = {"model", "cache_salt"}; /* blocks that are never shared */
    size_t len = strcspn(target, "?");
    struct reading r = {p, block_tokens, KEY_BLOCKS * block_tokens * BYTES_PER_TOKEN};

    memset(p, 0, sizeof *p);
    p->chat = len == strlen(targets[1]) && !strncmp(target, targets[1], len);
    if (!p->chat && (len != strlen(targets[0]) || strncmp(target, targets[0], len)))
        return 0;
    p->json = json_loadb((const char *)evbuffer_pullup(body, -1), evbuffer_get_length(body),
                         JSON_ALLOW_NUL, NULL);
    if (!json_is_object(p->json)) {
        prompt_free(p);
        return 0;
    }
    for (size_t i = 0; i < COUNT_OF(apart); i++) {
        const char *text = json_string_value(json_object_get(p->json, apart[i]));
        p->key = text ? balance_hash(p->key, text, strlen(text) + 1) : p->key;
    }
    if (p->chat)
        read_messages(&r, json_object_get(p->json, "messages"));
    else
        read_prompt(&r, json_object_get(p->json, "prompt"), 0);
    p->key |= 1;
    p->stream = json_is_true(json_object_get(p->json, "stream"));
    p->output = positive(p->json, "max_tokens", USUAL_OUTPUT);
    p->output = positive(p->json, "max_completion_tokens", p->output) * positive(p->json, "n", 1);
    return 1;
}

void prompt_free(struct prompt *p)
{
    json_decref(p->json);
    memset(p, 0, sizeof *p);
}

/* The object as bytes; NULL when memory is short. */
static struct evbuffer *dump(json_t *o)
{
    struct evbuffer *out = evbuffer_new();
    char *text = json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(17));

    if (!out || !text)
        abort();
    evbuffer_add(out, text, strlen(text));
    free(text);
    json_decref(o);
    return out;
}

static json_t *with_params(const struct prompt *p, json_t *params)
{
    json_t *o = json_copy(p->json);

    json_object_del(o, "kv_transfer_params"); /* not the client's to say */
    if (params)
        json_object_set_new(o, "kv_transfer_params", params);
    return o;
}

struct evbuffer *prompt_for_prefill(const struct prompt *p, json_t *params)
{
    /* One token in one piece; what says how many, or how they are sent, must not contradict that.
     */
    static const char *const one_if_there[] = {"max_completion_tokens", "min_tokens", "n"};
    static const char *const gone[] = {"stream_options", "best_of", "use_beam_search"};
    json_t *o = with_params(p, params);

    json_object_set_new(o, "stream", json_false());
    json_object_set_new(o, "max_tokens", json_integer(1));
    for (size_t i = 0; i < COUNT_OF(one_if_there); i++)
        if (json_object_get(o, one_if_there[i]))
            json_object_set_new(o, one_if_there[i], json_integer(1));
    for (size_t i = 0; i < COUNT_OF(gone); i++)
        json_object_del(o, gone[i]);
    return dump(o);
}

struct evbuffer *prompt_for_decode(const struct prompt *p, json_t *params)
{
    return dump(with_params(p, params));
}
