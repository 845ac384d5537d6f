/* SPDX-License-Identifier: Apache-2.0 */
/*
 * use_gdr: what is there of GPUDirect Storage is told, with the number that libcufile gives where
 * it does not work, and blocks go by way of the host's memory in any case.
 */
#include <dlfcn.h>
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "dev/dev.h"
#include "support.h"

enum { N = 8 };
static const char file[] = "libcufile.so.0";

/* What each generation of the fake is, and what is said of it. */
static const struct {
    const char *name;
    int err;
    const char *words;
} here[] = {
    {"old", -ENOTSUP, "host's memory here (compat mode): nvidia-fs is not loaded"},
    {"mid", 0, "libcufile.so.0, nvidia-fs 2.24: NFS, NVMe"},
    {"new", 0, "libcufile.so.0: NVMe by P2PDMA"},
};

static size_t generation(void)
{
    size_t i = 0;
    while (strcmp(here[i].name, getenv("UCM_TEST_GENERATION")))
        i++;
    return i;
}

static struct fake fake;
static void *library;

static int setup(void **state)
{
    fake = ts_fake_in(file);
    fake.fake_reset();
    return 0;
}

static int nothing_is_left(void **state)
{
    fake.fake_fail(NULL, 0, 0);
    assert_int_equal(fake.fake_leaks(), 0);
    return 0;
}

static void what_is_there_is_told(void **state)
{
    char text[256];
    assert_int_equal(ucmi_cufile_probe(text, sizeof text), here[generation()].err);
    TS_ASSERT_WORDS(text, here[generation()].words);
}

static void errors_are_told_by_number_and_remedy(void **state)
{
    static const struct {
        const char *call;
        int code;
        const char *words[3];
    } cases[] = {
        {"cuFileDriverOpen", 5001, {"libcufile.so.0", "error 5001", "nvidia-fs is not loaded"}},
        {"cuFileDriverOpen", 5011, {"error 5011, CUDA error 100", "driver", "CUDA"}},
        {"cuFileDriverOpen", 5033, {"libcufile.so.0", "error 5033", "CUDA driver nor nvidia-fs"}},
        {"cuFileDriverOpen", 5044, {"libcufile.so.0", "error 5044", "CUFILE_LOGFILE_PATH"}},
        {"cuFileDriverGetProperties",
         5010,
         {"libcufile.so.0", "error 5010", "nvidia-fs has failed"}},
    };
    for (size_t i = 0; i < TS_LEN(cases); i++) {
        char text[256];
        fake.fake_fail(cases[i].call, 1, cases[i].code);
        assert_int_equal(ucmi_cufile_probe(text, sizeof text), -ENODEV);
        TS_ASSERT_WORDS(text, cases[i].words[0], cases[i].words[1], cases[i].words[2]);
        assert_int_equal(fake.fake_leaks(), 0);
    }
}

/* The engine, or another library in its process, has it open. */
static void what_others_have_opened_stays_open(void **state)
{
    struct two_ints {
        int code, cuda;
    } (*open)(void), (*close)(void);
    long (*use_count)(void);
    char text[256];
    open = (struct two_ints(*)(void))dlsym(library, "cuFileDriverOpen");
    close = (struct two_ints(*)(void))dlsym(library, "cuFileDriverClose_v2");
    use_count = (long (*)(void))dlsym(library, "cuFileUseCount");
    assert_int_equal(open().code, 0);
    assert_int_equal(ucmi_cufile_probe(text, sizeof text), here[generation()].err);
    assert_true(use_count() > 0);
    close();
}

static struct {
    unsigned n;
    char text[512];
} said;

static void listen(void *arg, enum ucm_level level, const char *line)
{
    if (!strstr(line, "use_gdr"))
        return;
    said.n++;
    snprintf(said.text, sizeof said.text, "%s", line);
}

/* A dump and a load, and what was said of use_gdr. */
static void round_trip(const char *device, const char *use_gdr)
{
    const char *dir = ts_dir();
    struct ts_opts o = ts_opts_for("Cache|Posix", dir);
    ts_opt(&o, "device", "%s", device);
    ts_opt(&o, "device_id", "%d", ts_device(device)->id);
    ts_opt(&o, "use_gdr", "%s", use_gdr);
    said.n = 0;
    ucm_log_to(listen, NULL, UCM_WARN);
    struct ts_rig r = ts_rig_sure(&o);
    assert_string_equal(ts_rig_dump(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
    r = ts_rig_sure(&o);
    assert_string_equal(ts_rig_load(&r, 0, N), ts_all('.', N));
    ts_rig_close(&r);
    ucm_log_to(NULL, NULL, UCM_ERROR);
}

static void blocks_go_by_way_of_the_host_and_that_is_said(void **state)
{
    round_trip("cuda", "true");
    assert_int_equal(said.n, 2); /* one a store */
    TS_ASSERT_WORDS(said.text, "device cuda", here[generation()].words,
                    "all data goes by way of the host's memory");
    if (!here[generation()].err)
        TS_ASSERT_WORDS(said.text, "there, but blocks are checked on the host");
    fake.fake_fail("cuFileDriverOpen", 2, 5033);
    round_trip("cuda", "true");
    TS_ASSERT_WORDS(said.text, "device cuda", "error 5033", "all data goes by way of the host's");
}

static void other_devices_have_nothing_of_the_kind(void **state)
{
    round_trip("ascend", "true");
    assert_int_equal(said.n, 2);
    TS_ASSERT_WORDS(said.text, "device ascend", "nothing of the kind", "by way of the host's");
}

static void nobody_is_asked_who_was_not_wanted(void **state)
{
    round_trip("cuda", "false");
    assert_int_equal(said.n, 0);
    assert_int_equal(fake.fake_calls(NULL), 0);
}

#define CASE(fn) cmocka_unit_test_setup_teardown(fn, setup, nothing_is_left)
int main(void)
{
    static const struct CMUnitTest tests[] = {
        CASE(what_is_there_is_told),
        CASE(errors_are_told_by_number_and_remedy),
        CASE(what_others_have_opened_stays_open),
        CASE(blocks_go_by_way_of_the_host_and_that_is_said),
        CASE(other_devices_have_nothing_of_the_kind),
        CASE(nobody_is_asked_who_was_not_wanted),
    };
    library = dlopen(file, RTLD_NOW);
    cmocka_set_test_filter(getenv("UCM_TEST_FILTER"));
    return cmocka_run_group_tests_name("direct", tests, NULL, NULL);
}
