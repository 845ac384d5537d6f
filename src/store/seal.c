/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Checksums without a key and with one, and the file the key is in.
 *
 * The file may hold anything from 32 to 4096 bytes, all of which count; the keys in use are HMACs
 * of it.  It is opened once, by who opens a store.
 */
#include "store/seal.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ucm_config.h"

/* ---- without a key ---- */

static uint64_t plain_sum(const struct ucmi_seal *s, const struct ucmi_what *what,
                          const struct iovec *iov, unsigned niov)
{
    return ucmi_hash64v(iov, niov, what->kind);
}

const struct ucmi_seal ucmi_plain = {.sum = plain_sum};

const struct ucmi_seal *ucmi_seal_of(const struct ucmi_seal *given, const uint8_t ns[16])
{
    static const uint8_t none[UCMI_KEY_ID];
    const uint8_t *id = ns + 16 - UCMI_KEY_ID;
    if (memcmp(id, none, UCMI_KEY_ID) == 0)
        return &ucmi_plain;
    return given->key && memcmp(id, given->key->id, UCMI_KEY_ID) == 0 ? given : NULL;
}

void ucmi_key_wipe(struct ucmi_key *key)
{
    explicit_bzero(key, sizeof *key);
}

/* ---- with one ---- */

#if UCM_HAVE_CRYPTO
#include <openssl/evp.h>
#include <openssl/params.h>

static uint64_t keyed_sum(const struct ucmi_seal *s, const struct ucmi_what *what,
                          const struct iovec *iov, unsigned niov)
{
    struct {
        struct ucmi_what what;
        uint8_t hash[16];
    } in = {.what = *what};
    uint64_t sum = 0;
    size_t len;
    bool ok = EVP_MAC_init(s->hash, s->key->hash, sizeof s->key->hash, NULL);
    for (unsigned i = 0; ok && i < niov; i++)
        ok = EVP_MAC_update(s->hash, iov[i].iov_base, iov[i].iov_len);
    ok = ok && EVP_MAC_final(s->hash, in.hash, &len, sizeof in.hash) &&
         EVP_MAC_init(s->prf, s->key->prf, sizeof s->key->prf, NULL) &&
         EVP_MAC_update(s->prf, (const void *)&in, sizeof in) &&
         EVP_MAC_final(s->prf, (void *)&sum, &len, sizeof sum);
    return ok ? sum : ucmi_random_word(); /* never seen: what nobody believes, and fits nothing */
}

static EVP_MAC_CTX *context(const char *name)
{
    EVP_MAC *mac = EVP_MAC_fetch(NULL, name, NULL);
    EVP_MAC_CTX *c = mac ? EVP_MAC_CTX_new(mac) : NULL;
    EVP_MAC_free(mac);
    return c;
}

int ucmi_seal_open(struct ucmi_seal *s, const struct ucmi_key *key)
{
    size_t size = sizeof(uint64_t);
    OSSL_PARAM short_tag[] = {OSSL_PARAM_construct_size_t("size", &size),
                              OSSL_PARAM_construct_end()};
    *s = ucmi_plain;
    if (!key->given)
        return 0;
    *s = (struct ucmi_seal){
        .sum = keyed_sum, .key = key, .hash = context("POLY1305"), .prf = context("SIPHASH")};
    return s->hash && s->prf && EVP_MAC_CTX_set_params(s->prf, short_tag) ? 0 : -ENOMEM;
}

void ucmi_seal_close(struct ucmi_seal *s)
{
    EVP_MAC_CTX_free(s->hash);
    EVP_MAC_CTX_free(s->prf);
    *s = ucmi_plain;
}

static bool derive(const uint8_t *secret, size_t len, const char *name, uint8_t *out, size_t want)
{
    uint8_t mac[32];
    size_t n = 0;
    bool ok = EVP_Q_mac(NULL, "HMAC", NULL, "SHA256", NULL, secret, len, (const void *)name,
                        strlen(name), mac, sizeof mac, &n) &&
              n == sizeof mac;
    if (ok)
        memcpy(out, mac, want);
    explicit_bzero(mac, sizeof mac);
    return ok;
}

static int make_key(const char *path, const uint8_t *secret, size_t len, struct ucmi_key *key,
                    ucm_conf *conf)
{
    struct ucmi_seal s;
    key->given = derive(secret, len, "ucm integrity: id", key->id, sizeof key->id) &&
                 derive(secret, len, "ucm integrity: poly1305", key->hash, sizeof key->hash) &&
                 derive(secret, len, "ucm integrity: siphash", key->prf, sizeof key->prf);
    key->id[0] |= 1; /* not that of no key */
    bool ok = key->given && ucmi_seal_open(&s, key) == 0;
    if (key->given)
        ucmi_seal_close(&s);
    if (ok)
        return 0;
    ucmi_key_wipe(key);
    return ucmi_conf_fail(
        conf, -ENOTSUP,
        "integrity_key_file: %s: this libcrypto has no Poly1305, SipHash or HMAC; "
        "use its default provider, or leave the option out",
        path);
}
#else
int ucmi_seal_open(struct ucmi_seal *s, const struct ucmi_key *key)
{
    *s = ucmi_plain;
    return 0;
}

void ucmi_seal_close(struct ucmi_seal *s)
{
}

static int make_key(const char *path, const uint8_t *secret, size_t len, struct ucmi_key *key,
                    ucm_conf *conf)
{
    return ucmi_conf_fail(
        conf, -ENOTSUP,
        "integrity_key_file: %s: not in this build, libcrypto was missing; install "
        "libssl-dev and build again, or leave the option out",
        path);
}
#endif

/* ---- its file ---- */

enum { LEAST = 32, MOST = 4096 };

static const char *wrong_with(const struct stat *st)
{
    if (!S_ISREG(st->st_mode))
        return "is no regular file; give one";
    if (st->st_mode & (S_IRWXG | S_IRWXO))
        return "others than its owner may use it; chmod 600 it, and change the key if they have";
    if (st->st_size < LEAST)
        return "is too short; give 32 bytes at least (head -c 32 /dev/urandom)";
    if (st->st_size > MOST)
        return "is too long; give at most 4096 bytes (head -c 32 /dev/urandom)";
    return NULL;
}

int ucmi_key_read(const char *path, struct ucmi_key *key, ucm_conf *conf)
{
    uint8_t secret[MOST + 1];
    struct stat st;
    *key = (struct ucmi_key){0};
    if (!*path)
        return 0;
    /* Not waiting for a FIFO that somebody has put there. */
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    ssize_t n = fd < 0 || fstat(fd, &st) < 0 ? -errno : 0;
    const char *wrong = n < 0 ? NULL : wrong_with(&st);
    if (!n && !wrong && (n = TEMP_FAILURE_RETRY(read(fd, secret, sizeof secret))) != st.st_size)
        n = n < 0 ? -errno : -EAGAIN; /* it is being written */
    if (fd >= 0)
        close(fd);
    int err = n < 0
                  ? ucmi_conf_fail(conf, (int)n,
                                   "integrity_key_file: %s: cannot be read: %s; give a file of 32 "
                                   "random bytes that this user may read, and nobody else",
                                   path, ucmi_file_error((int)n))
              : wrong ? ucmi_conf_fail(conf, -EINVAL, "integrity_key_file: %s: %s", path, wrong)
                      : make_key(path, secret, (size_t)n, key, conf);
    explicit_bzero(secret, sizeof secret);
    return err;
}
