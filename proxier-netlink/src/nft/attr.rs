//! Attribute numbers of nf_tables messages.
// KERNEL: include/uapi/linux/netfilter/nf_tables.h and nf_tables_compat.h, v6.12.

pub(crate) const LIST_ELEM: u16 = 1;

pub(crate) const TABLE_NAME: u16 = 1;
pub(crate) const TABLE_FLAGS: u16 = 2;
pub(crate) const TABLE_USE: u16 = 3;
pub(crate) const TABLE_HANDLE: u16 = 4;
pub(crate) const TABLE_USERDATA: u16 = 6;
pub(crate) const TABLE_OWNER: u16 = 7;

pub(crate) const HOOK_HOOKNUM: u16 = 1;
pub(crate) const HOOK_PRIORITY: u16 = 2;
pub(crate) const HOOK_DEV: u16 = 3;

pub(crate) const CHAIN_TABLE: u16 = 1;
pub(crate) const CHAIN_HANDLE: u16 = 2;
pub(crate) const CHAIN_NAME: u16 = 3;
pub(crate) const CHAIN_HOOK: u16 = 4;
pub(crate) const CHAIN_POLICY: u16 = 5;
pub(crate) const CHAIN_USE: u16 = 6;
pub(crate) const CHAIN_TYPE: u16 = 7;
pub(crate) const CHAIN_USERDATA: u16 = 12;

pub(crate) const RULE_TABLE: u16 = 1;
pub(crate) const RULE_CHAIN: u16 = 2;
pub(crate) const RULE_HANDLE: u16 = 3;
pub(crate) const RULE_EXPRESSIONS: u16 = 4;
pub(crate) const RULE_COMPAT: u16 = 5;
pub(crate) const RULE_POSITION: u16 = 6;
pub(crate) const RULE_USERDATA: u16 = 7;
pub(crate) const RULE_ID: u16 = 9;
pub(crate) const RULE_POSITION_ID: u16 = 10;

pub(crate) const COMPAT_PROTO: u16 = 1;
pub(crate) const COMPAT_FLAGS: u16 = 2;

pub(crate) const SET_TABLE: u16 = 1;
pub(crate) const SET_NAME: u16 = 2;
pub(crate) const SET_FLAGS: u16 = 3;
pub(crate) const SET_KEY_TYPE: u16 = 4;
pub(crate) const SET_KEY_LEN: u16 = 5;
pub(crate) const SET_DATA_TYPE: u16 = 6;
pub(crate) const SET_DATA_LEN: u16 = 7;
pub(crate) const SET_DESC: u16 = 9;
pub(crate) const SET_ID: u16 = 10;
pub(crate) const SET_TIMEOUT: u16 = 11;
pub(crate) const SET_USERDATA: u16 = 13;
pub(crate) const SET_HANDLE: u16 = 16;
pub(crate) const SET_EXPR: u16 = 17;

pub(crate) const SET_DESC_SIZE: u16 = 1;
pub(crate) const SET_DESC_CONCAT: u16 = 2;
pub(crate) const SET_FIELD_LEN: u16 = 1;

pub(crate) const ELEM_KEY: u16 = 1;
pub(crate) const ELEM_DATA: u16 = 2;
pub(crate) const ELEM_FLAGS: u16 = 3;
pub(crate) const ELEM_TIMEOUT: u16 = 4;
pub(crate) const ELEM_EXPIRATION: u16 = 5;
pub(crate) const ELEM_USERDATA: u16 = 6;
pub(crate) const ELEM_EXPR: u16 = 7;
pub(crate) const ELEM_KEY_END: u16 = 10;

pub(crate) const ELEM_LIST_TABLE: u16 = 1;
pub(crate) const ELEM_LIST_SET: u16 = 2;
pub(crate) const ELEM_LIST_ELEMENTS: u16 = 3;
pub(crate) const ELEM_LIST_SET_ID: u16 = 4;

pub(crate) const DATA_VALUE: u16 = 1;
pub(crate) const DATA_VERDICT: u16 = 2;
pub(crate) const VERDICT_CODE: u16 = 1;
pub(crate) const VERDICT_CHAIN: u16 = 2;

pub(crate) const EXPR_NAME: u16 = 1;
pub(crate) const EXPR_DATA: u16 = 2;

pub(crate) const GEN_ID: u16 = 1;
pub(crate) const GEN_PROC_PID: u16 = 2;
pub(crate) const GEN_PROC_NAME: u16 = 3;

pub(crate) const IMMEDIATE_DREG: u16 = 1;
pub(crate) const IMMEDIATE_DATA: u16 = 2;

pub(crate) const BITWISE_SREG: u16 = 1;
pub(crate) const BITWISE_DREG: u16 = 2;
pub(crate) const BITWISE_LEN: u16 = 3;
pub(crate) const BITWISE_MASK: u16 = 4;
pub(crate) const BITWISE_XOR: u16 = 5;
pub(crate) const BITWISE_OP: u16 = 6;

pub(crate) const BYTEORDER_SREG: u16 = 1;
pub(crate) const BYTEORDER_DREG: u16 = 2;
pub(crate) const BYTEORDER_OP: u16 = 3;
pub(crate) const BYTEORDER_LEN: u16 = 4;
pub(crate) const BYTEORDER_SIZE: u16 = 5;

pub(crate) const CMP_SREG: u16 = 1;
pub(crate) const CMP_OP: u16 = 2;
pub(crate) const CMP_DATA: u16 = 3;

pub(crate) const RANGE_SREG: u16 = 1;
pub(crate) const RANGE_OP: u16 = 2;
pub(crate) const RANGE_FROM: u16 = 3;
pub(crate) const RANGE_TO: u16 = 4;

pub(crate) const LOOKUP_SET: u16 = 1;
pub(crate) const LOOKUP_SREG: u16 = 2;
pub(crate) const LOOKUP_DREG: u16 = 3;
pub(crate) const LOOKUP_SET_ID: u16 = 4;
pub(crate) const LOOKUP_FLAGS: u16 = 5;

pub(crate) const DYNSET_SET_NAME: u16 = 1;
pub(crate) const DYNSET_SET_ID: u16 = 2;
pub(crate) const DYNSET_OP: u16 = 3;
pub(crate) const DYNSET_SREG_KEY: u16 = 4;
pub(crate) const DYNSET_SREG_DATA: u16 = 5;
pub(crate) const DYNSET_TIMEOUT: u16 = 6;
pub(crate) const DYNSET_PAD: u16 = 8;
pub(crate) const DYNSET_FLAGS: u16 = 9;

pub(crate) const PAYLOAD_DREG: u16 = 1;
pub(crate) const PAYLOAD_BASE: u16 = 2;
pub(crate) const PAYLOAD_OFFSET: u16 = 3;
pub(crate) const PAYLOAD_LEN: u16 = 4;

pub(crate) const META_DREG: u16 = 1;
pub(crate) const META_KEY: u16 = 2;
pub(crate) const META_SREG: u16 = 3;

pub(crate) const CT_DREG: u16 = 1;
pub(crate) const CT_KEY: u16 = 2;
pub(crate) const CT_DIRECTION: u16 = 3;
pub(crate) const CT_SREG: u16 = 4;

pub(crate) const HASH_SREG: u16 = 1;
pub(crate) const HASH_DREG: u16 = 2;
pub(crate) const HASH_LEN: u16 = 3;
pub(crate) const HASH_MODULUS: u16 = 4;
pub(crate) const HASH_SEED: u16 = 5;
pub(crate) const HASH_OFFSET: u16 = 6;
pub(crate) const HASH_TYPE: u16 = 7;

pub(crate) const SOCKET_KEY: u16 = 1;
pub(crate) const SOCKET_DREG: u16 = 2;
pub(crate) const SOCKET_LEVEL: u16 = 3;

pub(crate) const LIMIT_RATE: u16 = 1;
pub(crate) const LIMIT_UNIT: u16 = 2;
pub(crate) const LIMIT_BURST: u16 = 3;
pub(crate) const LIMIT_TYPE: u16 = 4;
pub(crate) const LIMIT_FLAGS: u16 = 5;
pub(crate) const LIMIT_PAD: u16 = 6;

pub(crate) const COUNTER_BYTES: u16 = 1;
pub(crate) const COUNTER_PACKETS: u16 = 2;
pub(crate) const COUNTER_PAD: u16 = 3;

pub(crate) const REJECT_TYPE: u16 = 1;
pub(crate) const REJECT_ICMP_CODE: u16 = 2;

pub(crate) const NAT_TYPE: u16 = 1;
pub(crate) const NAT_FAMILY: u16 = 2;
pub(crate) const NAT_REG_ADDR_MIN: u16 = 3;
pub(crate) const NAT_REG_ADDR_MAX: u16 = 4;
pub(crate) const NAT_REG_PROTO_MIN: u16 = 5;
pub(crate) const NAT_REG_PROTO_MAX: u16 = 6;
pub(crate) const NAT_FLAGS: u16 = 7;

pub(crate) const TPROXY_FAMILY: u16 = 1;
pub(crate) const TPROXY_REG_ADDR: u16 = 2;
pub(crate) const TPROXY_REG_PORT: u16 = 3;

pub(crate) const MASQ_FLAGS: u16 = 1;
pub(crate) const MASQ_REG_PROTO_MIN: u16 = 2;
pub(crate) const MASQ_REG_PROTO_MAX: u16 = 3;

pub(crate) const REDIR_REG_PROTO_MIN: u16 = 1;
pub(crate) const REDIR_REG_PROTO_MAX: u16 = 2;
pub(crate) const REDIR_FLAGS: u16 = 3;

pub(crate) const FIB_DREG: u16 = 1;
pub(crate) const FIB_RESULT: u16 = 2;
pub(crate) const FIB_FLAGS: u16 = 3;

pub(crate) const NG_DREG: u16 = 1;
pub(crate) const NG_MODULUS: u16 = 2;
pub(crate) const NG_TYPE: u16 = 3;
pub(crate) const NG_OFFSET: u16 = 4;

pub(crate) const XT_NAME: u16 = 1;
pub(crate) const XT_REV: u16 = 2;
pub(crate) const XT_INFO: u16 = 3;
