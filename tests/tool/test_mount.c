/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What `ucm stat` says of mounts, from the kernel's words for them.
 */
#include <string.h>
#include <sys/sysmacros.h>

#include "../test.h"
#include "tool.h"

static struct mount_facts look(const char *text, unsigned minor)
{
    struct mount_facts m;
    FILE *f = fmemopen((void *)text, strlen(text), "r");
    assert_non_null(f);
    assert_int_equal(mount_look(f, makedev(0, minor), &m), 1);
    fclose(f);
    return m;
}

static struct mount_facts look_nfs(const char *options)
{
    char text[512];
    snprintf(text, sizeof text,
             "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
             "40 22 0:35 / /mnt/kv rw,relatime - nfs4 10.0.0.1:/ rw,%s,addr=10.0.0.1\n",
             options);
    return look(text, 35);
}

static void test_default_nfs_is_good(void **state)
{
    struct mount_facts m =
        look_nfs("vers=4.2,rsize=1048576,namlen=255,hard,proto=tcp,timeo=600,local_lock=none");
    assert_string_equal(m.type, "nfs4");
    assert_string_equal(m.options, "vers=4.2,hard,local_lock=none");
    assert_string_equal(m.warning, "");
    m = look_nfs("vers=3,soft,timeo=20,local_lock=flock");
    assert_string_equal(m.options, "vers=3,soft,local_lock=flock");
    assert_string_equal(m.warning, "");
}

static void test_local_locks_are_not(void **state)
{
    static const char *const bad[] = {"vers=3,hard,nolock", "vers=3,nolock,local_lock=all",
                                      "vers=4.2,hard,local_lock=posix", "local_lock=all"};
    for (size_t i = 0; i < COUNT_OF(bad); i++)
        assert_non_null(strstr(look_nfs(bad[i]).warning, "locks are local"));
}

static void test_other_file_systems(void **state)
{
    struct mount_facts m = look("40 22 0:35 / /a ro,relatime shared:3 master:1 - ext4 /dev/x rw\n"
                                "41 22 0:36 / /b rw - fuse.s3fs s3fs rw,user_id=0\n"
                                "42 22 0:37 / /c rw - xfs /dev/y rw,nolock\n",
                                35);
    assert_string_equal(m.type, "ext4");
    assert_non_null(strstr(m.warning, "read-only"));
    m = look("41 22 0:36 / /b rw - fuse.s3fs s3fs rw,user_id=0\n", 36);
    assert_non_null(strstr(m.warning, "cache"));
    assert_null(strstr(m.warning, "read-only"));
    m = look("42 22 0:37 / /c rw - xfs /dev/y rw,nolock\n", 37);
    assert_string_equal(m.warning, "");
}

static void test_not_there(void **state)
{
    struct mount_facts m;
    char text[] = "no such thing\n40 22 0:35 / /a rw - ext4\n";
    FILE *f = fmemopen(text, strlen(text), "r");
    assert_int_equal(mount_look(f, makedev(0, 36), &m), 0);
    fclose(f);
    assert_string_equal(m.type, "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_default_nfs_is_good),
        cmocka_unit_test(test_local_locks_are_not),
        cmocka_unit_test(test_other_file_systems),
        cmocka_unit_test(test_not_there),
    };
    return cmocka_run_group_tests_name("mount", tests, NULL, NULL);
}
