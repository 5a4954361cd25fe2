// A qemu-user plugin that counts executions of each instruction: "address count" lines in the file given by out=PATH.
//
// The declarations are those parts of qemu's plugin interface, version 1 (docs/devel/tcg-plugins.rst), that it uses:
// Debian's package lacks the header. Only addresses below LIMIT are counted: a static program is there.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
typedef void (*tb_callback)(qemu_plugin_id_t id, struct qemu_plugin_tb* tb);
typedef void (*udata_callback)(qemu_plugin_id_t id, void* data);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, tb_callback cb);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* tb);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb* tb, size_t i);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn* insn);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn* insn, enum qemu_plugin_op op, void* counter,
                                                uint64_t add);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, udata_callback cb, void* data);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

enum { LIMIT = 1 << 26 };
static uint64_t* counts;  // one for each 4 bytes below LIMIT
static char out[4096];

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb* tb) {
  (void)id;
  for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); i++) {
    struct qemu_plugin_insn* insn = qemu_plugin_tb_get_insn(tb, i);
    const uint64_t address = qemu_plugin_insn_vaddr(insn);
    if (address < LIMIT) {
      qemu_plugin_register_vcpu_insn_exec_inline(insn, QEMU_PLUGIN_INLINE_ADD_U64, &counts[address / 4], 1);
    }
  }
}

static void ended(qemu_plugin_id_t id, void* data) {
  (void)id, (void)data;
  FILE* file = fopen(out, "w");
  if (!file) exit(3);
  for (uint64_t i = 0; i < LIMIT / 4; i++) {
    if (counts[i]) fprintf(file, "%" PRIx64 " %" PRIu64 "\n", 4 * i, counts[i]);
  }
  fclose(file);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void* info, int argc,
                                                               char** argv) {
  (void)info;
  counts = calloc(LIMIT / 4, sizeof *counts);
  if (!counts || argc != 1 || strncmp(argv[0], "out=", 4) || strlen(argv[0]) >= sizeof out) return 1;
  strcpy(out, argv[0] + 4);
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, ended, NULL);
  return 0;
}
